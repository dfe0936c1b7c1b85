"""RefCOCO, RefCOCO+, RefCOCOg and RefCLEF in REFER's format (docs/method.md, Data formats).

Yu et al., ECCV 2016; Mao et al., CVPR 2016 (RefCOCOg); Kazemzadeh et al., EMNLP 2014 (RefCLEF).

A test file lists {image, text, ref_id}; `<refer_root>/<dataset>/` holds refs(SPLIT_BY).p, where a ref_id names an
annotation, an image id and a split, and instances.json, where an annotation has its box [x, y, w, h].
"""

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import GroundingConfig
from dataset.expressions import (
    EntryProblem,
    Expression,
    Problems,
    clean_text,
    is_text,
    locate,
    parse_boxes,
    require,
    usable,
)
from dataset.reading import DataError, load_json

MAX_WORDS = 30  # the release cuts an expression here
# Data set -> who split it -> the splits that refs(SPLIT_BY).p then has.
SPLITS: dict[str, dict[str, tuple[str, ...]]] = {
    "refcoco": {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")},
    "refcoco+": {"unc": ("train", "val", "testA", "testB")},
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
    "refclef": {"unc": ("train", "val", "testA", "testB", "testC"), "berkeley": ("train", "val", "test")},
}
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
            raise EntryProblem(
                f"the image has no detections in {self.file}; check that det_file belongs to the test file",
                f"image_id {image_id}",
            )
        return parse_boxes(self.by_image[str(image_id)], f"{self.file}: the image's detections")


class RefEntry(NamedTuple):
    """An entry of a test file, where it stands, and the size (height, width) that instances.json states.

    Its expression has no boxes, and only the entry's own keys, where its ref cannot be used.
    """

    where: str
    expression: Expression
    stated_size: tuple[int, int] | None = None


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
    """Read and check the expressions of the test files, in their order.

    The image is the entry's own `image` under image_root: the file names in refs(SPLIT).p are unreliable.

    Args:
        refer_root: the config's refcoco_data, the folder that holds the folder `dataset`.
        dataset, split_by: keys of `SPLITS`.
        det_file: JSON of {"<image_id>": [[x, y, w, h, ...], ...]}; None: the expressions have no detections.
        entry_split: RefCLEF: the split is the entry's own key `split`, and any that contains 'test' counts as "test".
            Otherwise it is that of the ref in refs(SPLIT).p.
        skip_missing: do not look whether the images are there.

    Raises:
        DataError: files or entries that cannot be used; all kinds of problems of the entries in one message.
    """
    splits_of(dataset, split_by)
    refer = load_refer(Path(refer_root) / dataset, split_by)
    detections = load_detections(det_file) if det_file else None
    problems = Problems()
    items = [
        (item.where, item.expression)
        for file in test_file
        for item in read_items(file, image_root, problems, refer, detections, entry_split)
    ]
    empty = f"{', '.join(test_file) or 'test_file'}: holds no entries"
    return usable(items, problems, skip_missing, empty)


def refclef_split(config: GroundingConfig) -> str:
    """Whose split of the refs to look RefCLEF's boxes up in: the config's `refer_split`.

    If the config does not say: unc as in the release, or berkeley if only that is there. Both hold the same refs, and
    an entry's own split decides what it counts for.
    """
    folder = Path(str(config.refcoco_data)) / "refclef"
    there = [split for split in SPLITS["refclef"] if refer_files(folder, split)[0].is_file()]
    return config.refer_split if "refer_split" in config.model_fields_set or not there else there[0]


def splits_of(dataset: str, split_by: str) -> tuple[str, ...]:
    """The splits of a data set, train first; raises `DataError` when it is not split by `split_by`."""
    known = SPLITS[dataset]
    if split_by not in known:
        raise DataError(
            f"{dataset} is split by {' and by '.join(known)}, not by {split_by}; correct refer_split in the config, or "
            "--split-by of prepare.py"
        )
    return known[split_by]


def read_items(
    file: str,
    image_root: str,
    problems: Problems,
    refer: Refer | None,
    detections: Detections | None = None,
    entry_split: bool = False,
) -> list[RefEntry]:
    """The entries of one test file, in order; notes what cannot be used. Raises `DataError` for the file itself.

    Without `refer` no ref is looked up. For entry_split see `load_expressions`.
    """
    items = []
    for index, row in enumerate(load_json(file, list)):
        where = f"{file}: entry {index}"
        with problems.at(where):
            name, text, ref_id = require(row, "image", str), require(row, "text", str), require(row, "ref_id", int)
            image, record = locate(image_root, name), {"image_path": name}
            if entry_split:
                record["split"] = require(row, "split", str)
            text = clean_text(text, MAX_WORDS, file, where, problems)
            split = record.get("split", "")
            split = "test" if "test" in split else split
            found = Expression(image, text, ref_id, split, np.empty((0, 4)), record)
            items.append(RefEntry(where, found))
            if refer is None:
                continue
            ref = refer.refs.get(ref_id)
            if ref is None:
                kind = f"ref_id is not in {refer.refs_file}; check that refcoco_data belongs to the test file"
                raise EntryProblem(kind, f"ref_id {ref_id}")
            found = replace(
                found,
                split=split if entry_split else ref["split"],
                boxes=refer.box(ref),
                detections=detections and detections.of(ref["image_id"]),
                categories=refer.category(ref),
            )
            items[-1] = RefEntry(where, found, refer.stated_size(ref))
    return items


def load_detections(file: str) -> Detections:
    """Read a det_file; raises `DataError` for the file itself."""
    return Detections(file, load_json(file, dict))


def refer_files(folder: Path, split_by: str) -> tuple[Path, Path]:
    """The files refs(SPLIT_BY).p and instances.json of a REFER data set."""
    return folder / f"refs({split_by}).p", folder / "instances.json"


def load_refer(folder: Path, split_by: str) -> Refer:
    """Read `<folder>/refs(<split_by>).p` and instances.json; raises `DataError` naming the file and the entry."""
    refs_file, instances_file = refer_files(folder, split_by)
    refs = load_refs(refs_file)
    with Problems() as problems:
        return Refer(refs, *read_instances(instances_file, problems), refs_file, instances_file)


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
