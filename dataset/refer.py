"""RefCOCO, RefCOCO+, RefCOCOg and RefCLEF in REFER's format (docs/method.md, Data formats).

Yu et al., ECCV 2016; Mao et al., CVPR 2016 (RefCOCOg); Kazemzadeh et al., EMNLP 2014 (RefCLEF).

A test file lists {image, text, ref_id}; `<refer_root>/<dataset>/` holds refs(SPLIT_BY).p, where a ref_id names an
annotation, an image id and a split, and instances.json, where an annotation has its box [x, y, w, h].
"""

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import GroundingConfig
from dataset.expressions import (
    DataFile,
    EntryProblem,
    Expression,
    Problems,
    Reading,
    is_text,
    load,
    locate,
    parse_boxes,
    require,
)
from dataset.reading import DataError, load_json
from dataset.segmentation import RLE, area, check_segmentation, to_rle

MAX_WORDS = 30  # the release cuts an expression here
# Data set -> who split it -> the splits that refs(SPLIT_BY).p then has.
SPLITS: dict[str, dict[str, tuple[str, ...]]] = {
    "refcoco": {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")},
    "refcoco+": {"unc": ("train", "val", "testA", "testB")},
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
    "refclef": {"unc": ("train", "val", "testA", "testB", "testC"), "berkeley": ("train", "val", "test")},
}
OWN_SPLITS = "refclef"  # the data set whose test files have their own splits
# The only globals that refs(SPLIT_BY).p may name; Python 2 called the module __builtin__.
SAFE_GLOBALS = {
    (module, name)
    for module in ("builtins", "__builtin__")
    for name in ("list", "tuple", "dict", "set", "frozenset", "str", "bytes", "int", "float", "bool")
}


RowsById = dict[Any, dict[str, Any]]  # of a file, by their id


class Refer(NamedTuple):
    """One REFER data set, rows as they stand in the files: refs by ref_id, annotations and images by id.

    Ids are integers, except RefCLEF's annotation ids, which are strings ("8756_2"). `categories` are names by id, and
    may be empty.
    """

    refs: RowsById
    annotations: RowsById
    images: RowsById
    categories: dict[int, str]
    refs_file: Path
    instances_file: Path

    def box(self, ref: dict[str, Any]) -> np.ndarray:
        """The box (1, 4) [x, y, w, h] of a ref's annotation; raises `EntryProblem` when there is none."""
        annotation = self.annotations.get(ref["ann_id"])
        if annotation is None:
            raise EntryProblem(
                f"the ref's annotation is not in {self.instances_file}; it must belong to {self.refs_file.name}",
                f"ref_id {ref['ref_id']}, ann_id {ref['ann_id']}",
            )
        return parse_boxes([annotation.get("bbox")], f"{self.instances_file}: 'bbox' of the ref's annotation")

    def region(self, ref: dict[str, Any]) -> RLE:
        """The pixels of a ref's annotation; raises `EntryProblem` when there are none, or no size of the image."""
        what = f"{self.instances_file}: 'segmentation' of the ref's annotation"
        size = self.stated_size(ref)
        if size is None:
            kind = f"{self.instances_file}: the ref's image lacks 'height' or 'width', which its segmentation needs"
            raise EntryProblem(kind, f"image_id {ref['image_id']}")
        segmentation = check_segmentation(self.annotations[ref["ann_id"]].get("segmentation"), what)
        try:
            found = to_rle(segmentation, *size)
        except EntryProblem as problem:
            raise EntryProblem(f"{self.instances_file}: {problem.kind} there", problem.detail) from None
        if not area(found):
            raise EntryProblem(f"{what} covers no pixel of the image", f"ann_id {ref['ann_id']}")
        return found

    def category(self, ref: dict[str, Any]) -> tuple[str, ...]:
        """The name of the category of a ref's annotation, if the files tell it."""
        category = self.annotations[ref["ann_id"]].get("category_id")
        return (self.categories[category],) if type(category) is int and category in self.categories else ()

    def stated_size(self, ref: dict[str, Any]) -> tuple[int, int] | None:
        """(height, width) of a ref's image by instances.json, if it is there."""
        image = self.images.get(ref["image_id"], {})
        height, width = image.get("height"), image.get("width")
        if type(height) is not int or type(width) is not int:
            return None
        if min(height, width) < 1:
            kind = f"{self.instances_file}: 'height' and 'width' of the ref's image must be positive; correct its entry"
            raise EntryProblem(kind, f"image_id {image['id']}, found {height} and {width}")
        return height, width


class Detections(NamedTuple):
    """The content of a det_file: image id -> boxes [x, y, w, h, ...]."""

    file: str
    by_image: dict[str, Any]

    def of(self, image_id: int) -> np.ndarray:
        """The detections (k, 4) [x, y, w, h] of an image; an empty list means that nothing was detected."""
        if str(image_id) not in self.by_image:
            kind = f"the image has no detections in {self.file}; check that det_file belongs to the test file"
            raise EntryProblem(kind, f"image_id {image_id}")
        return parse_boxes(self.by_image[str(image_id)], f"{self.file}: the image's detections")


def read_refcoco(config: GroundingConfig, reading: Reading) -> list[Expression]:
    """The expressions of RefCOCO, RefCOCO+ or RefCOCOg, with detections; their splits are those of refs(SPLIT_BY).p."""
    config.require("test_file", "refcoco_data", "det_file")
    return _read_test_files(config, reading, config.refer_dataset, config.det_file)


def read_refclef(config: GroundingConfig, reading: Reading) -> list[Expression]:
    """The expressions of RefCLEF; an entry has its own split, and any that contains 'test' counts as "test"."""
    config.require("test_file", "refcoco_data")
    return _read_test_files(config, reading, OWN_SPLITS, None)


def load_expressions(
    *,
    test_file: list[str],
    image_root: str,
    refer_root: str,
    dataset: str,
    split_by: str = "unc",
    det_file: str | None = None,
    entry_split: bool = False,
    skip_missing: bool = False,
) -> list[Expression]:
    """The expressions of test files, for scripts: without a config, and without detections where there are none.

    Args:
        refer_root: the config's refcoco_data, the folder that holds the folder `dataset`.
        dataset, split_by: keys of `SPLITS`.
        det_file: JSON of {"<image_id>": [[x, y, w, h, ...], ...]}.
        entry_split: the entries have their own splits, as those of RefCLEF.
        skip_missing: do not look whether the images are there.

    Raises:
        DataError: as `dataset.expressions.load`.
    """
    splits_of(dataset, split_by)
    options = image_root, Path(refer_root, dataset), split_by, det_file, entry_split
    files = [(file, *options) for file in test_file]
    return load(lambda reading: [one for each in files for one in reading.once(_read_test_file, *each)], skip_missing)


def _read_test_files(config: GroundingConfig, reading: Reading, dataset: str, det_file: str | None) -> list[Expression]:
    split_by = split_by_of(config, dataset)
    splits_of(dataset, split_by)
    masks = any(name.startswith("mask_") for name in config.metrics)
    folder = Path(str(config.refcoco_data), dataset)
    options = config.image_root, folder, split_by, det_file, dataset == OWN_SPLITS, masks
    return [one for file in config.test_file for one in reading.once(_read_test_file, file, *options)]


def split_by_of(config: GroundingConfig, dataset: str) -> str:
    """Whose split of the refs to look boxes up in: the config's `refer_split`.

    If the config does not say, for RefCLEF: unc as in the release, or berkeley if only that is there. Both hold the
    same refs, and an entry's own split decides what it counts for.
    """
    if dataset != "refclef" or "refer_split" in config.model_fields_set:
        return config.refer_split
    folder = Path(str(config.refcoco_data)) / dataset
    there = [split for split in SPLITS[dataset] if refer_files(folder, split)[0].is_file()]
    return (there or [config.refer_split])[0]


def splits_of(dataset: str, split_by: str) -> tuple[str, ...]:
    """The splits of a data set, train first; raises `DataError` when it is not split by `split_by`."""
    known = SPLITS[dataset]
    if split_by not in known:
        raise DataError(
            f"{dataset} is split by {' and by '.join(known)}, not by {split_by}; correct refer_split in the config, or "
            "--split-by of prepare.py"
        )
    return known[split_by]


def _read_test_file(
    reading: Reading,
    file: str,
    image_root: str,
    folder: Path,
    split_by: str,
    det_file: str | None,
    entry_split: bool,
    masks: bool = False,
) -> list[Expression]:
    """The expressions of a test file, in order; before it, what its entries refer to is read.

    With `masks` they have their regions. The image is the entry's own `image` under image_root: the file names in
    refs(SPLIT_BY).p are unreliable.
    """
    refer = reading.once(read_refer, folder, split_by)
    detections = reading.once(_read_detections, det_file) if det_file else None
    boxed: set[int] = set()  # ref_ids
    regions: dict[int, RLE] = {}  # by ref_id

    def parse(file: DataFile, where: str, row: Any) -> list[Expression]:
        name, text, ref_id = require(row, "image", str), require(row, "text", str), require(row, "ref_id", int)
        image, record = locate(image_root, name), {"image_path": name}
        if entry_split:
            record["split"] = require(row, "split", str)
        text = file.clean(where, text, MAX_WORDS)
        file.says(where, image, text=text)
        if refer is None:
            return []
        ref = refer.refs.get(ref_id)
        if ref is None:
            kind = f"ref_id is not in {refer.refs_file}; check that refcoco_data belongs to the test file"
            raise EntryProblem(kind, f"ref_id {ref_id}")
        split = record["split"] if "split" in record else ref["split"]
        if "split" in record and "test" in split:
            split = "test"
        boxes, size = refer.box(ref), refer.stated_size(ref)
        detected = detections and detections.of(ref["image_id"])
        if masks and ref_id not in regions:
            regions[ref_id] = refer.region(ref)
        if ref_id not in boxed:
            boxed.add(ref_id)
            file.says(where, image, boxes=boxes)
        if size:
            file.says(where, image, size=size)
        category, region = refer.category(ref), regions.get(ref_id)
        return [Expression(image, text, ref_id, split, boxes, record, detected, categories=category, region=region)]

    return reading.entries(file, "expressions", "test_file", parse)


def _read_detections(reading: Reading, det_file: str) -> Detections | None:
    """None where the file cannot be read."""
    with reading.file(det_file, "images with detections", "det_file") as file:
        found = Detections(det_file, load_json(det_file, dict))
        file.count = len(found.by_image)
        return found
    return None


def refer_files(folder: Path, split_by: str) -> tuple[Path, Path]:
    """The files refs(SPLIT_BY).p and instances.json of a REFER data set."""
    return folder / f"refs({split_by}).p", folder / "instances.json"


def load_refer(folder: Path, split_by: str) -> Refer:
    """Read a data set's two files; raises `DataError` naming the file and the entry."""
    with Reading() as reading:
        found = read_refer(reading, folder, split_by)
    assert found
    return found


def read_refer(reading: Reading, folder: Path, split_by: str) -> Refer | None:
    """Read `<folder>/refs(<split_by>).p` and instances.json; None where one of them cannot be read."""
    refs_file, instances_file = refer_files(folder, split_by)
    refs, tables = None, None
    with reading.file(refs_file, "refs", "refcoco_data") as file:
        refs = read_refs(refs_file, file.problems)
        file.count = len(refs)
    with reading.file(instances_file, "annotations", "refcoco_data") as file:
        tables = read_instances(instances_file, file.problems)
        file.count = len(tables[0])
    return None if refs is None or tables is None else Refer(refs, *tables, refs_file, instances_file)


def read_instances(path: Path, problems: Problems) -> tuple[RowsById, RowsById, dict[int, str]]:
    """Annotations, images and names of categories by id; notes rows without one, and rows that share one."""
    instances = load_json(path, dict)
    for key in ("annotations", "images"):
        if not isinstance(instances.get(key), list):
            raise DataError(f"{path}: key '{key}' must be a list; is this REFER's instances.json?")
    annotations = by_id(instances["annotations"], f"{path}: annotations entry", problems, id=(int, str))
    images = by_id(instances["images"], f"{path}: images entry", problems, id=(int,))
    rows = instances.get("categories")  # odd ones are passed over, since nothing depends on their names
    named = [(row.get("id"), row.get("name")) for row in rows if isinstance(row, dict)] if type(rows) is list else []
    return annotations, images, {number: name for number, name in named if type(number) is int and is_text(name)}


def by_id(rows: list[Any], source: str, problems: Problems, **keys: tuple[type, ...]) -> RowsById:
    """Rows by their id, the last of `keys`; each key has one of the types given.

    Rows that lack a key or have the id of an earlier row are noted, by `source` and their index, and left out.
    """
    table: RowsById = {}
    for index, row in enumerate(rows):
        with problems.at(f"{source} {index}"):
            for key, kinds in keys.items():
                row_id = require(row, key, *kinds)
            if row_id in table:
                kind = f"an earlier entry has the same {key}, and only one can be meant; were two data sets joined?"
                raise EntryProblem(kind, f"{key} {row_id}")
            table[row_id] = row
    return table


def load_refs(path: Path) -> RowsById:
    """Read refs(SPLIT).p, a pickled list of {ref_id, ann_id, image_id, split, sentences, ...}; raises `DataError`."""
    with Problems() as problems:
        return read_refs(path, problems)


def read_refs(path: Path, problems: Problems) -> RowsById:
    """The refs of refs(SPLIT).p by ref_id, in order; refs that lack a key or repeat a ref_id are noted and left out.

    Nothing in the pickle is executed: it may hold plain values and containers only, of Python 2 or 3.

    Raises:
        DataError: the file is missing or no such pickle, or names anything else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        others = ", ".join(sorted(other.name for other in path.parent.glob("refs(*).p") if other != path))
        there = f", or correct refer_split: there is {others}" if others else ""
        message = f"{path}: cannot be read ({error.strerror}); check refcoco_data in the config{there}"
        raise DataError(message) from error
    refs = _unpickle(data, path)
    if not isinstance(refs, list):
        raise DataError(f"{path}: expected a pickled list of refs, found a {type(refs).__name__}")
    keys = {"ann_id": (int, str), "image_id": (int,), "split": (str,), "ref_id": (int,)}
    return by_id(refs, f"{path}: ref", problems, **keys)


class _PlainUnpickler(pickle._Unpickler):
    """An unpickler of plain values: it refuses a pickle that names any other global, before anything is called.

    Python's own unpickler, not the C one: there, eight bytes can ask for a memo of tens of gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE_GLOBALS:
            raise DataError(f"names the global {module}.{name}")
        return super().find_class(module, name)


def _unpickle(data: bytes, path: Path) -> Any:
    """Unpickle plain values. Python 2's byte strings become str: UTF-8, or else Latin-1."""
    try:
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        except UnicodeDecodeError:
            return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except DataError as error:
        raise DataError(
            f"{path}: {error}, but REFER's refs hold plain values only; it is not loaded, since it could run code: "
            "download it anew from a source that you trust"
        ) from None
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(f"{path}: not a readable pickle ({error}); is the download complete?") from error
