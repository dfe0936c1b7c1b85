"""REFER's raw files -> the lists that training and evaluation read; MAttNet's detections -> dets.json (SPEC section 4).

REFER (Yu et al., ECCV 2016; Kazemzadeh et al., EMNLP 2014): `<dataset>/refs(SPLIT_BY).p` and instances.json. A list
holds {"image", "text", "ref_id", "split"}, in the order of the refs and their sentences, as dataset/refer.py reads it.
MAttNet (Yu et al., CVPR 2018): a list of {"det_id", "box": [x, y, w, h], "image_id", "category_name", "score", ...}.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dataset.expressions import EntryProblem, Problems, is_box, require
from dataset.reading import DataError, load_json
from dataset.refer import MAX_WORDS, Refer, by_id, load_refer, reference_box, splits_of
from dataset.text import clean_caption, has_content
from utils import write_text

PARTS = ("train", "val", "test")  # one file each; "test" holds every testing split
COCO_NAME = "COCO_train2014_{:012d}.jpg"
NAMED_BY_FILE = ("refclef",)  # its images are SAIAPR's, named by instances.json; all others are COCO's, named by id
Row = dict[str, Any]


@dataclass
class Count:
    """What a split of refs(SPLIT_BY).p holds: refs and sentences."""

    refs: int = 0
    sentences: int = 0
    repeated: int = 0  # equal to an earlier sentence of the same ref, and left out
    empty: int = 0  # nothing is left once cleaned; kept all the same, since the published counts hold them

    @property
    def expressions(self) -> int:
        """The entries that are written."""
        return self.sentences - self.repeated


@dataclass
class Lists:
    """The entries of each of `PARTS`, and by split what they were made of."""

    parts: dict[str, list[Row]] = field(default_factory=lambda: {part: [] for part in PARTS})
    counts: dict[str, Count] = field(default_factory=dict)

    def table(self) -> str:
        """The counts, a line a split."""
        names = ("refs", "sentences", "repeated", "empty", "expressions")
        lines = [f"{'split':8}" + "".join(f"{name:>13}" for name in names)]
        for split, count in self.counts.items():
            lines.append(f"{split:8}" + "".join(f"{getattr(count, name):>13}" for name in names))
        return "\n".join(lines)


class _Making(NamedTuple):
    """How entries are made; see `make_lists`."""

    refer: Refer
    by_file_name: bool
    on_disk: dict[str, str] | None
    keep_repeated: bool


def make_lists(
    folder: Path, dataset: str, split_by: str, image_root: Path | None = None, keep_repeated: bool = False
) -> Lists:
    """Make the lists of a data set.

    An image's name is that which it has on disk: COCO_train2014_<12 digits of its id>.jpg, or for RefCLEF the one that
    instances.json gives its id. The file names in refs(SPLIT_BY).p are of something else.

    Args:
        folder: holds the folder `dataset`, as refcoco_data does in the configs.
        dataset, split_by: keys of `dataset.refer.SPLITS`.
        image_root: where the images are: each must be there, or in a folder below (`find_images`), and has that path.
            None: the name alone, unchecked.
        keep_repeated: write equal sentences of a ref as often as they stand there, instead of once.

    Raises:
        DataError: files that cannot be used; all kinds of problems of the refs in one message.
    """
    lists = Lists(counts={split: Count() for split in splits_of(dataset, split_by)})
    for name in (f"refs({split_by}).p", "instances.json"):
        if not (folder / dataset / name).is_file():
            raise DataError(
                f"{folder / dataset / name}: does not exist; {folder} must hold {dataset}/ as it is in REFER's "
                f"{dataset}.zip"
            )
    making = _Making(
        refer=load_refer(folder / dataset, split_by),
        by_file_name=dataset in NAMED_BY_FILE,
        on_disk=None if image_root is None else find_images(image_root),
        keep_repeated=keep_repeated,
    )
    problems = Problems()
    for index, ref in enumerate(making.refer.refs.values()):
        try:
            _add_ref(ref, making, lists)
        except EntryProblem as problem:
            problems.add(f"{making.refer.refs_file}: ref {index} (ref_id {ref['ref_id']})", problem)
    problems.check()
    return lists


def _add_ref(ref: Row, making: _Making, lists: Lists) -> None:
    part, image = part_of(ref["split"]), _image(ref, making)
    reference_box(ref, making.refer)
    count = lists.counts.setdefault(ref["split"], Count())
    count.refs += 1
    seen: set[str] = set()
    for sentence in require(ref, "sentences", list):
        text = require(sentence, "sent", str)
        count.sentences += 1
        count.empty += not has_content(clean_caption(text, MAX_WORDS))
        if text in seen and not making.keep_repeated:
            count.repeated += 1
        else:
            seen.add(text)
            row = {"image": image, "text": text, "ref_id": ref["ref_id"], "split": ref["split"]}
            lists.parts[part].append(row)


def part_of(split: str) -> str:
    """Which of `PARTS` a split of REFER's goes to: "test" holds testA, testB, testC and test."""
    if split in ("train", "val"):
        return split
    if split.startswith("test"):
        return "test"
    raise EntryProblem("the ref's split is none of train, val and test...", repr(split))


def _image(ref: Row, making: _Making) -> str:
    """The path of a ref's image, under image_root where that is known."""
    refer, image_id = making.refer, ref["image_id"]
    detail = f"image_id {image_id}"
    if image_id not in refer.images:
        raise EntryProblem(
            f"the ref's image is not in {refer.instances_file}; it must belong to {refer.refs_file.name}", detail
        )
    name = require(refer.images[image_id], "file_name", str) if making.by_file_name else COCO_NAME.format(image_id)
    if making.on_disk is None:
        return name
    path = making.on_disk.get(Path(name).name)
    if path is None:
        raise EntryProblem("the ref's image is not under --image-root; check the folder", f"{detail}, {name}")
    return path


def find_images(root: Path) -> dict[str, str]:
    """The .jpg files of a folder, its subfolders, and their folders images/: file name -> path relative to the folder.

    That finds COCO's above train2014/ and SAIAPR's above 00/images/ as well; of equal names the nearest counts, then
    the first in alphabetical order. Raises `DataError` when there is none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder; --image-root must be the one that holds the images")
    below = sorted(path for path in root.iterdir() if path.is_dir())
    found: dict[str, str] = {}
    for folder in (root, *below, *(path / "images" for path in below)):
        for path in folder.glob("*.jpg"):
            found.setdefault(path.name, path.relative_to(root).as_posix())
    if not found:
        raise DataError(f"{root}: holds no .jpg; --image-root must be the folder of the images")
    return found


def write_lists(out: Path, dataset: str, lists: Lists) -> None:
    """Write <dataset>_{train,val,test}.json; a part that the data set does not have is an empty list."""
    for part, rows in lists.parts.items():
        write_text(out / f"{dataset}_{part}.json", json.dumps(rows) + "\n")


# ---- detections


def group_detections(file: Path, instances: Path | None = None) -> dict[str, list[list[float]]]:
    """MAttNet's list as {"<image_id>": [[x, y, w, h], ...]}: images by number, boxes of an image in the list's order.

    Args:
        instances: REFER's instances.json; images of it in which nothing was detected get an empty list. Without an
            entry, evaluation takes an image for forgotten and stops.

    Raises:
        DataError: a file that cannot be used; all kinds of problems of the entries in one message.
    """
    found: dict[int, list[list[float]]] = {}
    if instances is not None:
        found = {image_id: [] for image_id in _image_ids(instances)}
    problems = Problems()
    rows = _load(file, list)
    for index, row in enumerate(rows):
        try:
            box = require(row, "box", list)
            if not is_box(box):
                raise EntryProblem("key 'box' must be four finite numbers [x, y, w, h]", f"found {box!r:.60}")
            found.setdefault(_image_id(row), []).append(box)
        except EntryProblem as problem:
            problems.add(f"{file}: entry {index}", problem)
    problems.check()
    if not rows:
        raise DataError(f"{file}: holds no detections")
    return {str(image_id): found[image_id] for image_id in sorted(found)}


def _image_id(row: Row) -> int:
    """The image id of a detection, an integer or one written as a string."""
    value = row.get("image_id")
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):
        return int(value)
    return require(row, "image_id", int)


def _image_ids(instances: Path) -> list[int]:
    rows = _load(instances, dict).get("images")
    if not isinstance(rows, list):
        raise DataError(f"{instances}: key 'images' must be a list; is this REFER's instances.json?")
    problems = Problems()
    images = by_id(rows, f"{instances}: images entry", problems, int)
    problems.check()
    return list(images)


def _load(path: Path, kind: type) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: does not exist; check the path")
    return load_json(path, kind)
