"""`prepare.py check`: whether everything that configs name can be used, before a long run instead of in it.

The rules are those of config.py and of the readers in dataset/: here they read on where training and evaluation stop.
Checked here alone: repeated entries, phrases that the box file does not mention, boxes outside of their images, stated
sizes, and the published sizes of splits.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from config import BertConfig, GroundingConfig, PretrainConfig, load_any_config, load_bert_config, size_problems
from dataset import flickr, matching, own, refer, vg
from dataset.expressions import Expression, Problems, first_of
from dataset.raw.check_images import Claim, evenly, inspect_images, note_claims, note_images
from dataset.raw.check_report import CheckedFile, CheckReport
from dataset.raw.refer import NOT_IN_SAIAPR

Found = TypeVar("Found")

# (file, image_root, problems) -> [(where it stands, an item with an image and a text)]
ReadEntries: TypeAlias = Callable[[str, str, Problems], list[tuple[str, Any]]]
# Benchmarks whose test_file needs no other file. A new reader is one line here.
TEST_FILE_READERS: dict[str, ReadEntries] = {"own": own.read_expressions}
NOT_VISUAL = "0"  # the phrase id that Flickr30k Entities gives to all phrases that nothing in the image stands for
UNKNOWN_PHRASE = "the phrase's id has no boxes and is not under 'scene' or 'nobox'; evaluation leaves the phrase out"
DATASET_NAMES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg", "refclef": "RefCLEF"}
# What the papers count: expressions, each as often as it stands in the refs; images of Flickr30k Entities and RefCLEF.
PUBLISHED = {
    "RefCOCO (unc)": {"val": 10_834, "testA": 5_657, "testB": 5_095},
    "RefCOCO+ (unc)": {"val": 10_758, "testA": 5_726, "testB": 4_889},
    "RefCOCOg (umd)": {"val": 4_896, "test": 9_602},
    "RefCLEF (berkeley)": {"val": 1_000, "test": 10_000},
    "RefCLEF (unc)": {"val": 2_000, "testA": 485, "testB": 490, "testC": 465},
    "Flickr30k": {"val": 1_000, "test": 1_000},
}


def check(configs: list[str], overrides: list[str], sample: int | None, workers: int, shown: int) -> CheckReport:
    """Check configs and everything that they name; what several of them name is checked once.

    Args:
        overrides: `--set` items, for each of the configs.
        sample: how many images to decode; None: all. The headers of all are read in any case.
        workers: processes that read images.
        shown: how many cases of each kind of problem the report lists.
    """
    checker = Checker(CheckReport(shown), overrides)
    for path in configs:
        checker.check_config(path)
    checker.check_images(sample, workers)
    return checker.report


class Checker:
    """Reads what configs name; keeps the images, and what entries say of them, to be looked at in the end."""

    def __init__(self, report: CheckReport, overrides: list[str]) -> None:
        self.report = report
        self.overrides = overrides
        self.config = ""  # the path of the config that is being checked
        self.roots: dict[str, str] = {}  # image_root -> the config that names it first
        self.images: dict[str, dict[Path, str]] = {}  # image_root -> image -> the first entry that names it
        self.claims: list[Claim] = []
        self.done: dict[Hashable, Any] = {}

    def once(self, read: Callable[..., Found], *what: Hashable) -> Found:
        """`read(*what)`, or what it returned for an earlier config that names the same."""
        key = (read, *what)
        if key not in self.done:
            self.done[key] = read(*what)
        return self.done[key]

    def read(
        self, file: str | Path, checked: str, key: str, reader: Callable[[Problems], Found]
    ) -> tuple[CheckedFile, Found | None]:
        """Add a file that the config names by `key`, and read it; None if it cannot be read."""
        row = self.report.add(str(file), checked, f"{key} of {self.config}")
        with row.attempt():
            found = reader(row.errors)
            row.count = len(found) if isinstance(found, list | dict) else None
            return row, found
        return row, None

    # ---- configs

    def check_config(self, path: str) -> None:
        """Check one config and the data files that it names."""
        self.config = path
        row = self.report.add(path, "config", named_by="")
        with row.attempt():
            config = load_any_config(path, self.overrides)
            self.roots.setdefault(config.image_root, f"image_root of {path}")
            bert = self.once(self.bert_config, config.bert_config)
            for problem in size_problems(config, bert) if bert else []:
                row.fail(problem)
            if isinstance(config, PretrainConfig):
                self.check_training(config, bert, row)
            else:
                self.check_evaluation(config, bert, row)

    def bert_config(self, file: str) -> BertConfig | None:
        return self.read(file, "BERT config", "bert_config", lambda problems: load_bert_config(file))[1]

    def check_training(self, config: PretrainConfig, bert: BertConfig | None, row: CheckedFile) -> None:
        row.checked = "training config"
        if bert and config.max_tokens > bert.max_position_embeddings:
            kind = "max_tokens is above bert_config's max_position_embeddings: a longer caption would stop the run"
            detail = f"{config.max_tokens} and {bert.max_position_embeddings}"
            row.warnings.add(self.config, kind, detail)
        if config.vit_init:
            weights = self.report.add(config.vit_init, "image encoder's weights", f"vit_init of {self.config}")
            if not Path(config.vit_init).is_file():
                weights.fail("no such file")
        if not config.train_file:
            row.fail("train_file lists no files")
        options = config.image_root, config.max_words, config.empty_captions
        boxes = [self.once(self.training_file, file, *options) for file in config.train_file]
        if config.add_gcam and boxes and None not in boxes and not any(boxes):
            row.warnings.add(self.config, vg.NO_BOXES)

    def check_evaluation(self, config: GroundingConfig, bert: BertConfig | None, row: CheckedFile) -> None:
        row.checked = "evaluation config"
        if bert and bert.fusion_layers and config.block_num not in bert.fusion_layers:
            known = f"{bert.fusion_layers[0]} to {bert.fusion_layers[-1]}"
            row.fail(f"block_num is {config.block_num}; the fusion layers are {known}")
        if config.benchmark not in (None, *DATASET_NAMES, "flickr"):
            checks = [self.check_other]
        else:
            checks = [self.check_refer] if config.test_file or config.refcoco_data or config.det_file else []
            flickr_files = config.image_ids_file or config.phrase_box_file or config.sentences_file
            checks += [self.check_flickr] if flickr_files else []
        if not checks and not config.matching_file:
            keys = "test_file and refcoco_data, or image_ids_file, phrase_box_file and sentences_file"
            row.fail(f"names no data; it needs {keys}")
        for check_files in checks:
            with row.attempt():
                check_files(config, row)
        for file in config.matching_file:
            pairs = "matching_file", "image-text pairs", "pairs", matching.read_pairs
            self.once(self.entry_file, file, config.image_root, *pairs)

    def check_refer(self, config: GroundingConfig, row: CheckedFile) -> None:
        """RefCOCO, RefCOCO+ or RefCOCOg with detections, or RefCLEF with splits in its entries."""
        refclef = is_refclef(self.config, config)
        dataset = "refclef" if refclef else config.refer_dataset
        split_by = refer.refclef_split(config) if refclef else config.refer_split
        name = f"{DATASET_NAMES[dataset]} ({split_by})"
        row.checked = f"evaluation config, {name}"
        refer.splits_of(dataset, split_by)
        config.require("test_file", "refcoco_data", *([] if refclef else ["det_file"]))
        folder, det_file = Path(str(config.refcoco_data)) / dataset, None if refclef else config.det_file
        options = config.image_root, folder, split_by, det_file, refclef
        counts = sum((self.once(self.test_file, file, *options) for file in config.test_file), Counter[str]())
        sizes = {other: PUBLISHED.get(f"RefCLEF ({other})", {}) for other in refer.SPLITS["refclef"] if refclef}
        for other, published in sizes.items():  # REFER's archive is known to lack some images
            lacking = [published[split] - counts[split] for split in published]
            if counts.keys() - {"train"} == published.keys() and all(0 <= n <= len(NOT_IN_SAIAPR) for n in lacking):
                if other != split_by:
                    row.notes.append(
                        f"by the numbers of their images the test files are of the {other} split, while refs are "
                        f"looked up in refs({split_by}).p; the release does so, since both hold the same refs"
                    )
                return
        _note_sizes(row, name, "images" if refclef else "expressions", counts)

    def check_flickr(self, config: GroundingConfig, row: CheckedFile) -> None:
        row.checked = "evaluation config, Flickr30k"
        config.require("image_ids_file", "phrase_box_file", "sentences_file")
        splits = flickr.triples(config.image_ids_file, config.phrase_box_file, config.sentences_file)
        counts = sum((self.once(self.flickr_split, *files, config.image_root) for files in splits), Counter[str]())
        _note_sizes(row, "Flickr30k", "images", counts)

    def check_other(self, config: GroundingConfig, row: CheckedFile) -> None:
        """The user's own data, and benchmarks that were added to those that ship."""
        benchmark = str(config.benchmark)
        row.checked = f"evaluation config, {benchmark}"
        if benchmark not in TEST_FILE_READERS:
            row.notes.append(
                f"what the benchmark '{benchmark}' reads is not checked: it is not one of those known here"
            )
            return
        config.require("test_file")
        for file in config.test_file:
            entries = "test_file", "expressions", "entries", TEST_FILE_READERS[benchmark]
            self.once(self.entry_file, file, config.image_root, *entries)

    # ---- data files

    def training_file(self, file: str, image_root: str, max_words: int, empty_captions: str) -> int | None:
        """Read one training file; returns the number of its boxes, None if it cannot be read."""
        read_entries = partial(vg.read_entries, file, image_root, max_words, empty_captions=empty_captions)
        row, entries = self.read(file, "training entries", "train_file", read_entries)
        if entries is None:
            return None
        self.keep_images(row, image_root, ((entry.source, entry.image, tuple(entry.captions)) for entry in entries))
        boxed = [Claim(row, entry.source, entry.image, entry.boxes, None, False) for entry in entries if entry.boxes]
        self.claims += boxed
        return sum(len(claim.boxes) for claim in boxed)

    def entry_file(self, file: str, root: str, key: str, checked: str, noun: str, read_entries: ReadEntries) -> None:
        """Read a file of entries that need no other file."""
        row, found = self.read(file, checked, key, partial(read_entries, file, root))
        if found is not None:
            self.keep_images(row, root, ((where, item.image, item.text) for where, item in found))
            items = [(where, item) for where, item in first_of(found).items() if isinstance(item, Expression)]
            self.claims += [Claim(row, where, item.image, _corners(item.boxes)) for where, item in items]
            if not found and not row.errors.kinds:
                row.fail(f"holds no {noun}")

    def test_file(
        self, file: str, image_root: str, folder: Path, split_by: str, det_file: str | None, refclef: bool
    ) -> Counter[str]:
        """Read one test file, and before it what its entries refer to.

        Returns its number of expressions by split; of RefCLEF, whose splits are known by them, its number of images.
        """
        tables = self.once(self.refer_tables, folder, split_by)
        detections = self.once(self.detections, det_file) if det_file else None

        def read_items(problems: Problems) -> list[refer.RefEntry]:
            return refer.read_items(file, image_root, problems, tables, detections, entry_split=refclef)

        row, found = self.read(file, "expressions", "test_file", read_items)
        items = found or []
        if found == [] and not row.errors.kinds:
            row.fail("holds no entries")
        self.keep_images(row, image_root, ((where, one.image, one.text) for where, one, _ in items))
        usable = [item for item in items if len(item.expression.boxes)]
        for where, one, _ in first_of((item.expression.ref_id, item) for item in usable).values():
            self.claims.append(Claim(row, where, one.image, _corners(one.boxes)))
        for where, one, size in first_of((item.expression.image, item) for item in usable).values():
            if size:
                self.claims.append(Claim(row, where, one.image, size=size))
        if refclef:
            return Counter(split for split, _ in {(one.record["split"], one.image) for _, one, _ in usable})
        return Counter(one.split for _, one, _ in usable)

    def refer_tables(self, folder: Path, split_by: str) -> refer.Refer | None:
        """Read refs(SPLIT_BY).p and instances.json, each of them even if the other cannot be read."""
        refs_file, instances_file = refer.refer_files(folder, split_by)
        key, read_instances = "refcoco_data", partial(refer.read_instances, instances_file)
        _, refs = self.read(refs_file, "refs", key, partial(refer.read_refs, refs_file))
        row, tables = self.read(instances_file, "annotations", key, read_instances)
        if tables is not None:
            row.count = len(tables[0])
        if refs is None or tables is None:
            return None
        return refer.Refer(refs, *tables, refs_file, instances_file)

    def detections(self, file: str) -> refer.Detections | None:
        row, found = self.read(file, "images with detections", "det_file", lambda noted: refer.load_detections(file))
        row.count = len(found.by_image) if found else None
        return found

    def flickr_split(self, ids_file: str, box_file: str, sentences_file: str, root: str) -> Counter[str]:
        """Read the three files of a split; returns its number of images, by the split's name."""
        name = ""
        row, found = self.read(ids_file, "image ids", "image_ids_file", lambda p: flickr.read_ids(ids_file, p, root))
        ids = found or []
        if found is not None:
            name = flickr.split_of(ids_file, row.notes.append)
            row.checked = f"image ids ({name})"
        images = [(f"{ids_file}: image {image_id}", flickr.image_path(root, image_id), None) for image_id in ids]
        self.keep_images(row, root, images)

        read_boxes = partial(flickr.read_boxes, box_file, ids)
        row, found_boxes = self.read(box_file, "images with boxes", "phrase_box_file", read_boxes)
        boxes = found_boxes or {}
        for image_id, of in boxes.items():
            where, image = f"{box_file}: image {image_id}", flickr.image_path(root, image_id)
            self.claims.append(Claim(row, where, image, size=of.size))
            for phrase_id, corners in of.by_id.items():
                self.claims.append(Claim(row, f"{where}, phrase id {phrase_id}", image, _corners(corners), of.size))

        read_phrases = partial(flickr.read_phrases, sentences_file, ids, boxes, name, root)
        row, phrases = self.read(sentences_file, "phrases with boxes", "sentences_file", read_phrases)
        if phrases is not None:
            row.count = sum(phrase.expression is not None for phrase in phrases)
            if boxes and not row.count:
                row.fail("no phrase has boxes; do the files match?")
        for where, image_id, phrase_id, expression in phrases or []:
            known = {*boxes[image_id].boxless, NOT_VISUAL} if image_id in boxes else {phrase_id}
            if expression is None and phrase_id not in known:
                row.warnings.add(where, UNKNOWN_PHRASE, f"phrase_id {phrase_id}")
        return Counter({name: len(ids)} if ids else {})

    # ---- images

    def keep_images(self, row: CheckedFile, root: str, entries: Iterable[tuple[str, Path, Hashable]]) -> None:
        """Keep each image with the first entry (where, image, text) that names it, and note repeated entries."""
        images = self.images.setdefault(root, {})
        first: dict[Hashable, str] = {}
        for where, image, text in entries:
            images.setdefault(image, where)
            earlier = where if text is None else first.setdefault((image, text), where)
            if earlier is not where:
                kind = "image and text are those of an earlier entry"
                row.warnings.add(where, kind, f"as {earlier.rpartition(': ')[2]}")

    def check_images(self, sample: int | None, workers: int) -> None:
        """Look at every image that was named, and compare boxes and stated sizes with it."""
        rows = {root: self.report.add(root, "images", named_by) for root, named_by in self.roots.items()}
        for root, row in rows.items():
            if not Path(root).is_dir():
                row.fail("no such folder")
                self.images.pop(root, None)
        paths = list(dict.fromkeys(path for first in self.images.values() for path in first))
        decoded = evenly(paths, sample)
        seen = inspect_images(paths, decoded, workers)
        for root, first in self.images.items():
            count = len(decoded & first.keys())
            rows[root].count = len(first)
            rows[root].checked = f"images, {'all' if count == len(first) else f'{count:,}'} decoded"
            note_images(rows[root], first, seen)
        note_claims(self.claims, seen)


def is_refclef(path: str, config: GroundingConfig) -> bool:
    """Whether a config with test_file is of RefCLEF and not of RefCOCO: its key `benchmark` tells.

    Without that key, the names of its test files and its own tell; failing that, RefCLEF is the one without detections.
    """
    if config.benchmark:
        return config.benchmark == "refclef"
    names = " ".join(Path(name).name.lower() for name in (*config.test_file, path))
    if "refclef" in names or "refcoco" in names:
        return "refclef" in names
    return config.det_file is None


def _corners(boxes: np.ndarray) -> list[list[float]]:
    """Boxes (n, 4) [x, y, w, h] -> [x1, y1, x2, y2]."""
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]).tolist()


def _note_sizes(row: CheckedFile, name: str, unit: str, counts: Counter[str]) -> None:
    """Note splits that are not of the published size: a subset, or other data in the same format, may be intended."""
    for split, published in PUBLISHED.get(name, {}).items():
        if counts and counts[split] != published:
            row.notes.append(f"{name} {split}: {counts[split]:,} {unit}; published: {published:,}")
