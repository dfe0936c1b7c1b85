"""`prepare.py check`: whether everything that configs name can be used, before a long run instead of in it.

The rules are those of config.py, of model_sizes.py and of the readers in dataset/, which here read on where training
and evaluation stop.
Checked here alone: repeated entries, boxes outside of their images, stated sizes, and the published sizes of splits.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Protocol

from config import GroundingConfig, PretrainConfig, load_any_config
from dataset import vg
from dataset.expressions import DataFile, Expression, Reading
from dataset.flickr import split_of
from dataset.loader.entries import PackedEntries
from dataset.own import read_pairs
from dataset.raw.check_images import evenly, inspect_images, note_claims, note_images, note_training_regions
from dataset.raw.check_report import CheckReport
from dataset.raw.refer import NOT_IN_SAIAPR
from dataset.refer import SPLITS, split_by_of
from model_sizes import BertConfig, load_bert_config, size_problems
from utils import UserError

# What the papers count: expressions, each as often as it stands in the refs; images of Flickr30k Entities and RefCLEF.
PUBLISHED = {
    "RefCOCO (unc)": {"val": 10_834, "testA": 5_657, "testB": 5_095},
    "RefCOCO+ (unc)": {"val": 10_758, "testA": 5_726, "testB": 4_889},
    "RefCOCOg (umd)": {"val": 4_896, "test": 9_602},
    "RefCLEF (berkeley)": {"val": 1_000, "test": 10_000},
    "RefCLEF (unc)": {"val": 2_000, "testA": 485, "testB": 490, "testC": 465},
    "Flickr30k": {"val": 1_000, "test": 1_000},
}


class Readable(Protocol):
    """What is used of a benchmark."""

    @property
    def name(self) -> str: ...
    @property
    def read(self) -> Callable[[GroundingConfig, Reading], list[Expression]]: ...


def check(
    configs: list[str],
    overrides: list[str],
    sample: int | None,
    workers: int,
    shown: int,
    find: Callable[[GroundingConfig], Readable],
) -> CheckReport:
    """Check configs and everything that they name; what several of them name is checked once.

    Args:
        overrides: `--set` items, for each of the configs.
        sample: how many images to decode; None: all. The headers of all are read in any case.
        workers: processes that read images.
        shown: how many cases of each kind of problem the report lists.
        find: the benchmark that a config names by its key `benchmark`.
    """
    checker = Checker(overrides, find)
    for path in configs:
        checker.check_config(path)
    checker.check_images(sample, workers)
    return CheckReport(checker.reading.files, shown)


class Checker:
    """Reads what configs name; keeps the images, and what entries say of them, to be looked at in the end."""

    def __init__(self, overrides: list[str], find: Callable[[GroundingConfig], Readable]) -> None:
        self.reading = Reading(goes_on=True)
        self.overrides = overrides
        self.find = find
        self.roots: dict[str, DataFile] = {}  # image_root -> its row in the report
        self.images: dict[str, dict[Path, str]] = {}  # image_root -> image -> the first entry that names it
        self.training: list[tuple[DataFile, PackedEntries]] = []

    def check_config(self, path: str) -> None:
        """Check one config and the data files that it names."""
        self.reading.config = path
        with self.reading.file(path, "config") as row:
            known = len(self.reading.files)
            config = load_any_config(path, self.overrides)
            root = DataFile(config.image_root, "images", f"image_root of {path}")
            self.roots.setdefault(config.image_root, root)
            bert = self.reading.once(read_bert_config, config.bert_config)
            for problem in size_problems(config, bert) if bert else []:
                row.fail(problem)
            if isinstance(config, PretrainConfig):
                self.check_training(config, bert, row)
            else:
                self.check_evaluation(config, bert, row)
            for file in self.reading.files[known:]:
                self.keep_images(file, config.image_root, ((one.where, one.image, one.text) for one in file.claims))

    def check_training(self, config: PretrainConfig, bert: BertConfig | None, row: DataFile) -> None:
        row.holds = "training config"
        if bert and config.max_tokens > bert.max_position_embeddings:
            kind = "max_tokens is above bert_config's max_position_embeddings: a longer caption would stop the run"
            detail = f"{config.max_tokens} and {bert.max_position_embeddings}"
            row.remarks.add(row.name, kind, detail)
        if config.vit_init:
            with self.reading.file(config.vit_init, "image encoder's weights", "vit_init") as weights:
                if not Path(config.vit_init).is_file():
                    weights.fail("no such file")
        if not config.train_file:
            row.fail("train_file lists no files")
        options = config.image_root, config.max_words, config.empty_captions
        for own in (phase.config for phase in config.phases()):
            key = "relation_file" if own.relation_file else "train_file"
            boxes = [self.reading.once(self.read_training_file, key, file, *options) for file in own.train_file]
            if own.add_gcam and boxes and None not in boxes and not any(boxes):
                row.remarks.add(row.name, vg.NO_BOXES)
            named = [entries for file, entries in self.training if file.name in own.train_file]
            related = [entries.related.any() for entries in named if len(entries)]
            if own.paraphrases and related and not any(related):
                row.fail(vg.NO_SYNONYMS)

    def read_training_file(
        self, reading: Reading, key: str, name: str, image_root: str, max_words: int, empty_captions: str
    ) -> int | None:
        """Read one training file; returns the number of its boxes and segmentations, None if it cannot be read."""
        entries = None
        with reading.file(name, "training entries", key) as file:
            entries = vg.read_entries(name, image_root, max_words, file.problems, empty_captions)
            file.count = len(entries)
            if (lacking := len(entries) - int(entries.related.sum())) and key == "relation_file":
                file.notes.append(f"{lacking:,} of {len(entries):,} entries have no synonyms, and take no part")
            self.training.append((file, entries))
            self.keep_images(file, image_root, ((one.source, one.image, tuple(one.captions)) for one in entries))
        return None if entries is None else sum(len(one.boxes) + len(one.segmentations) for one in entries)

    def check_evaluation(self, config: GroundingConfig, bert: BertConfig | None, row: DataFile) -> None:
        row.holds = "evaluation config"
        if bert and bert.explained_layers and config.block_num not in bert.explained_layers:
            known = f"{bert.explained_layers[0]} to {bert.explained_layers[-1]}"
            row.fail(f"block_num is {config.block_num}; the fusion layers are {known}")
        names = benchmarks_of(row.name, config)
        if not names and not config.matching_file:
            keys = "test_file and refcoco_data, or image_ids_file, phrase_box_file and sentences_file"
            row.fail(f"names no data; it needs {keys}")
        for name in names:
            try:
                self.check_benchmark(config.model_copy(update={"benchmark": name}), row)
            except UserError as error:
                row.fail(str(error))
        for file in config.matching_file:
            self.reading.once(read_pairs, file, config.image_root)

    def check_benchmark(self, config: GroundingConfig, row: DataFile) -> None:
        """Read a benchmark as evaluation does, and note splits that are not of the published sizes."""
        key, benchmark = str(config.benchmark), self.find(config)
        split_by = split_by_of(config, key) if key in SPLITS else ""
        name = f"{benchmark.name} ({split_by})" if split_by else benchmark.name
        row.holds = f"evaluation config, {name}"
        expressions = benchmark.read(config, self.reading)
        if key == "flickr":
            files = [file for file in self.reading.files if file.name in config.image_ids_file]
            counts = Counter(split_of(file.name) for file in files for _ in file.claims)
        elif key == "refclef":
            counts = Counter(split for split, _ in {(one.record["split"], one.image) for one in expressions})
            if other := refclef_split(counts):
                if other != split_by:
                    row.notes.append(
                        f"by the numbers of their images the test files are of the {other} split, while refs are "
                        f"looked up in refs({split_by}).p; the release does so, since both hold the same refs"
                    )
                return
        else:
            counts = Counter(one.split for one in expressions)
        unit = "images" if key in ("refclef", "flickr") else "expressions"
        for split, published in PUBLISHED.get(name, {}).items():
            if counts and counts[split] != published:  # a subset, or other data in the same format, may be intended
                row.notes.append(f"{name} {split}: {counts[split]:,} {unit}; published: {published:,}")

    # ---- images

    def keep_images(self, file: DataFile, root: str, entries: Iterable[tuple[str, Path, Hashable]]) -> None:
        """Keep each image with the first entry (where, image, text) that names it, and note repeated entries."""
        images = self.images.setdefault(root, {})
        first: dict[Hashable, str] = {}
        for where, image, text in entries:
            images.setdefault(image, where)
            earlier = where if text is None else first.setdefault((image, text), where)
            if earlier is not where:
                kind = "image and text are those of an earlier entry"
                file.remarks.add(where, kind, f"as {earlier.rpartition(': ')[2]}")

    def check_images(self, sample: int | None, workers: int) -> None:
        """Look at every image that was named, and compare boxes and stated sizes with it."""
        files = list(self.reading.files)
        for root, row in self.roots.items():
            self.reading.files.append(row)
            if not Path(root).is_dir():
                row.fail("no such folder")
                self.images.pop(root, None)
        paths = list(dict.fromkeys(path for first in self.images.values() for path in first))
        decoded = evenly(paths, sample)
        seen = inspect_images(paths, decoded, workers)
        for root, first in self.images.items():
            count = len(decoded & first.keys())
            row = self.roots[root]
            row.count = len(first)
            row.holds = f"images, {'all' if count == len(first) else f'{count:,}'} decoded"
            note_images(row, first, seen)
        sizes = {path: found.size for path, found in seen.items()}
        for file in files:
            note_claims(file, sizes)
        for file, entries in self.training:
            note_training_regions(file, entries, sizes)


def benchmarks_of(path: str, config: GroundingConfig) -> list[str]:
    """The benchmarks whose data a config names: its key `benchmark` tells, and failing that, its other keys.

    RefCLEF is told from RefCOCO by the names of the test files and of the config; failing that, it has no detections.
    """
    if config.benchmark:
        return [config.benchmark]
    found: list[str] = []
    if config.test_file or config.refcoco_data or config.det_file:
        names = " ".join(Path(name).name.lower() for name in (*config.test_file, path))
        refclef = "refclef" in names or ("refcoco" not in names and config.det_file is None)
        found.append("refclef" if refclef else config.refer_dataset)
    if config.image_ids_file or config.phrase_box_file or config.sentences_file:
        found.append("flickr")
    return found


def refclef_split(counts: Counter[str]) -> str | None:
    """Whose split of RefCLEF has these numbers of images; REFER's archive is known to lack some of them."""
    for split_by in SPLITS["refclef"]:
        published = PUBLISHED[f"RefCLEF ({split_by})"]
        lacking = [size - counts[split] for split, size in published.items()]
        if counts.keys() - {"train"} == published.keys() and all(0 <= n <= len(NOT_IN_SAIAPR) for n in lacking):
            return split_by
    return None


def read_bert_config(reading: Reading, path: str) -> BertConfig | None:
    with reading.file(path, "BERT config", "bert_config"):
        return load_bert_config(path)
    return None
