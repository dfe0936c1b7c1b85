"""Whether everything that configs name can be used: `prepare.py check`, before a long run instead of in it.

The rules are those of config.py and of the readers in dataset/; here every file and every entry is asked, and reading
goes on where training and evaluation would stop.
"""

from collections import Counter
from pathlib import Path

from config import BertConfig, GroundingConfig, PretrainConfig, load_any_config, load_bert_config, size_problems
from dataset import flickr, refer, vg
from dataset.expressions import EntryProblem
from dataset.raw import check_files
from dataset.raw.check_files import Gathered
from dataset.raw.check_images import evenly, inspect, note_boxes, note_images
from dataset.raw.check_report import Report, Row
from dataset.raw.refer import NOT_IN_SAIAPR

NAMES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg", "refclef": "RefCLEF"}
# What the papers count: expressions, each as often as it stands in the refs; images of Flickr30k Entities and RefCLEF.
PUBLISHED = {
    "RefCOCO (unc)": {"val": 10_834, "testA": 5_657, "testB": 5_095},
    "RefCOCO+ (unc)": {"val": 10_758, "testA": 5_726, "testB": 4_889},
    "RefCOCOg (umd)": {"val": 4_896, "test": 9_602},
    "RefCLEF (berkeley)": {"val": 1_000, "test": 10_000},
    "RefCLEF (unc)": {"val": 2_000, "testA": 485, "testB": 490, "testC": 465},
    "Flickr30k": {"val": 1_000, "test": 1_000},
}


def check(configs: list[str], overrides: list[str], sample: int | None, workers: int, shown: int) -> Report:
    """Check configs and everything that they name; what several of them name is checked once.

    Args:
        overrides: `--set` items, for each of the configs.
        sample: how many images to decode; None: all. The headers of all are read in any case.
        workers: processes that read images.
        shown: how many cases of each kind of problem the report lists.
    """
    report = Report(shown)
    gathered = Gathered(report)
    roots: dict[str, str] = {}
    for path in configs:
        row = report.row(path, "config", named_by="")
        with row.attempt():
            config = load_any_config(path, overrides)
            roots.setdefault(config.image_root, f"image_root of {path}")
            bert = gathered.once(_bert, config.bert_config, config=path)
            for problem in size_problems(config, bert) if bert else []:
                row.fail(problem)
            if isinstance(config, PretrainConfig):
                _training(gathered, path, config, bert, row)
            else:
                _evaluation(gathered, path, config, bert, row)
    _look_at_images(gathered, roots, sample, workers)
    return report


def _bert(gathered: Gathered, file: str, config: str) -> BertConfig | None:
    row = gathered.report.row(file, "BERT config", f"bert_config of {config}")
    with row.attempt():
        return load_bert_config(file)
    return None


# ---- training


def _training(gathered: Gathered, path: str, config: PretrainConfig, bert: BertConfig | None, row: Row) -> None:
    row.checked = "training config"
    if bert and config.max_tokens > bert.max_position_embeddings:
        kind = "max_tokens is above bert_config's max_position_embeddings: a longer caption would stop the run"
        row.warnings.add(path, EntryProblem(kind, f"{config.max_tokens} and {bert.max_position_embeddings}"))
    if config.vit_init:
        weights = gathered.report.row(config.vit_init, "image encoder's weights", f"vit_init of {path}")
        if not Path(config.vit_init).is_file():
            weights.fail("no such file")
    if not config.train_file:
        row.fail("train_file lists no files")
    options = config.image_root, config.max_words, config.empty_captions
    boxes = [gathered.once(check_files.training_file, file, *options, config=path) for file in config.train_file]
    if config.add_gcam and boxes and None not in boxes and not any(boxes):
        row.warnings.add(path, EntryProblem(vg.NO_BOXES))


# ---- evaluation


def _evaluation(gathered: Gathered, path: str, config: GroundingConfig, bert: BertConfig | None, row: Row) -> None:
    row.checked = "evaluation config"
    if bert and bert.fusion_layers and config.block_num not in bert.fusion_layers:
        known = f"{bert.fusion_layers[0]} to {bert.fusion_layers[-1]}"
        row.fail(f"block_num is {config.block_num}; the fusion layers are {known}")
    other = config.benchmark not in (None, *NAMES, "flickr")
    of_refer = not other and bool(config.test_file or config.refcoco_data or config.det_file)
    of_flickr = not other and bool(config.image_ids_file or config.phrase_box_file or config.sentences_file)
    if other:
        with row.attempt():
            _other(gathered, path, config, row)
    elif not (of_refer or of_flickr or config.matching_file):
        row.fail(
            "names no data; it needs test_file and refcoco_data, or image_ids_file, phrase_box_file and sentences_file"
        )
    if of_refer:
        with row.attempt():
            _refer(gathered, path, config, row)
    if of_flickr:
        with row.attempt():
            _flickr(gathered, path, config, row)
    for file in config.matching_file:
        gathered.once(check_files.pairs, file, config.image_root, config=path)


def _other(gathered: Gathered, path: str, config: GroundingConfig, row: Row) -> None:
    """One's own data, and benchmarks that were added to those that ship."""
    row.checked = f"evaluation config, {config.benchmark}"
    if config.benchmark != "own":
        row.notes.append(
            f"what the benchmark '{config.benchmark}' reads is not checked: it is not one of those known here"
        )
        return
    config.require("test_file")
    for file in config.test_file:
        gathered.once(check_files.own_file, file, config.image_root, config=path)


def _refer(gathered: Gathered, path: str, config: GroundingConfig, row: Row) -> None:
    """RefCOCO, RefCOCO+ or RefCOCOg with detections, or RefCLEF with splits in its entries."""
    refclef = is_refclef(path, config)
    dataset = "refclef" if refclef else config.refer_dataset
    split_by = refer.refclef_split(config) if refclef else config.refer_split
    name = f"{NAMES[dataset]} ({split_by})"
    row.checked = f"evaluation config, {name}"
    refer.splits_of(dataset, split_by)
    config.require("test_file", "refcoco_data", *([] if refclef else ["det_file"]))
    of = check_files.ReferFiles(
        folder=Path(str(config.refcoco_data)) / dataset,
        split_by=split_by,
        image_root=config.image_root,
        det_file=None if refclef else config.det_file,
        entry_split=refclef,
    )
    counts: Counter[str] = Counter()
    for file in config.test_file:
        counts += gathered.once(check_files.test_file, file, of, config=path)
    if refclef and (fitting := [other for other in refer.SPLITS[dataset] if _has_sizes(counts, f"RefCLEF ({other})")]):
        if split_by not in fitting:
            row.notes.append(
                f"by the numbers of their images the test files are of the {fitting[0]} split, while refs are looked "
                f"up in refs({split_by}).p; the release does so, since both hold the same refs"
            )
    else:
        _note_sizes(row, name, "images" if refclef else "expressions", counts)


def _has_sizes(counts: Counter[str], name: str) -> bool:
    """Whether these are RefCLEF's published numbers of images, some of which REFER's archive is known to lack."""
    published = PUBLISHED.get(name, {})
    return counts.keys() - {"train"} == published.keys() and all(
        size - len(NOT_IN_SAIAPR) <= counts[split] <= size for split, size in published.items()
    )


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


def _flickr(gathered: Gathered, path: str, config: GroundingConfig, row: Row) -> None:
    row.checked = "evaluation config, Flickr30k"
    config.require("image_ids_file", "phrase_box_file", "sentences_file")
    counts: Counter[str] = Counter()
    for files in flickr.triples(config.image_ids_file, config.phrase_box_file, config.sentences_file):
        counts += gathered.once(check_files.flickr_split, *files, config.image_root, config=path)
    _note_sizes(row, "Flickr30k", "images", counts)


def _note_sizes(row: Row, name: str, unit: str, counts: Counter[str]) -> None:
    """Note where splits are not of the published size; a subset, or other data in the same format, may be meant."""
    for split, published in PUBLISHED.get(name, {}).items():
        if counts and counts[split] != published:
            row.notes.append(f"{name} {split}: {counts[split]:,} {unit}; published: {published:,}")


# ---- images


def _look_at_images(gathered: Gathered, roots: dict[str, str], sample: int | None, workers: int) -> None:
    """Look at every image that was named, and hold boxes and annotated sizes against them."""
    rows = {root: gathered.report.row(root, "images", named_by) for root, named_by in roots.items()}
    for root, row in rows.items():
        if not Path(root).is_dir():
            row.fail("no such folder")
            gathered.images.pop(root, None)
    paths = list(dict.fromkeys(path for first in gathered.images.values() for path in first))
    decoded = evenly(paths, sample)
    seen = inspect(paths, decoded, workers)
    for root, first in gathered.images.items():
        rows[root].count = len(first)
        count = len(decoded & first.keys())
        rows[root].checked = f"images, {'all' if count == len(first) else f'{count:,}'} decoded"
        note_images(rows[root], first, seen)
    for placed in gathered.placed:
        size = placed.size or (seen[placed.image].size if placed.image in seen else None)
        if size:
            note_boxes(placed, *size)
    for stated in gathered.stated:
        size = seen[stated.image].size if stated.image in seen else None
        if size and size != stated.size:
            kind = "the annotated size is not that of the image file"
            detail = f"annotated {stated.size[1]}x{stated.size[0]}, {stated.image} has {size[1]}x{size[0]}"
            stated.row.warnings.add(stated.where, EntryProblem(kind, detail))
