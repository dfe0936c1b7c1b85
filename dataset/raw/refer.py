"""REFER's raw files -> lists of expressions; MAttNet's detections -> dets.json (docs/method.md, Data formats).

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
from dataset.raw.archives import is_hidden
from dataset.reading import DataError, load_json
from dataset.refer import MAX_WORDS, SPLITS, Refer, by_id, load_refer, refer_files, splits_of
from dataset.text import clean_caption, has_content
from utils import write_text

PARTS = ("train", "val", "test")  # one file each; "test" holds every testing split
COCO_FILE_NAME = "COCO_train2014_{:012d}.jpg"
NAMED_BY_FILE = ("refclef",)  # its images are SAIAPR's, named in instances.json; the others are COCO's, named by id
USUAL_SPLITS = {"refclef": "berkeley"}  # whose split the published numbers use, where not the first of `SPLITS`
# Ids of images that every copy of REFER's SAIAPR archive lacks or holds broken.
NOT_IN_SAIAPR = {17975, 19575, 19579}
SHOWN_MISSING = 5


@dataclass
class SplitCount:
    """What a split of refs(SPLIT_BY).p holds, and how many entries are made of it."""

    refs: int = 0
    sentences: int = 0
    repeated: int = 0  # equal to an earlier sentence of the same ref
    empty: int = 0  # nothing is left once cleaned; written nevertheless, as the published counts include them
    missing: int = 0  # sentences of refs that --skip-missing leaves out; of the other numbers, in `sentences` alone
    expressions: int = 0


@dataclass
class Lists:
    """What `make_lists` makes.

    Args:
        parts: the entries of each of `PARTS`.
        counts: by split, what they were made of.
        missing: image id -> name of each image that is not on disk.
    """

    parts: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {part: [] for part in PARTS})
    counts: dict[str, SplitCount] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)

    def table(self) -> str:
        """One line per split; if images are missing, how many sentences they have, and the first of them."""
        names = ["refs", "sentences", "repeated", "empty", *(["missing"] if self.missing else []), "expressions"]
        lines = [f"{'split':8}" + "".join(f"{name:>13}" for name in names)]
        for split, count in self.counts.items():
            lines.append(f"{split:8}" + "".join(f"{getattr(count, name):>13}" for name in names))
        if self.missing:
            first = ", ".join(list(self.missing.values())[:SHOWN_MISSING])
            more = f" and {len(self.missing) - SHOWN_MISSING:,} more" if len(self.missing) > SHOWN_MISSING else ""
            lines.append(f"left out, not under --image-root: {len(self.missing):,} images ({first}{more})")
        return "\n".join(lines)


class _Making(NamedTuple):
    """How entries are made; see `make_lists`."""

    refer: Refer
    by_file_name: bool
    on_disk: dict[str, str] | None
    keep_repeated: bool
    skip_missing: bool


def usual_split(dataset: str) -> str:
    """Whose split of a data set the published numbers use."""
    return USUAL_SPLITS.get(dataset, next(iter(SPLITS[dataset])))


def default_split(folder: Path, dataset: str) -> str:
    """The usual split; if its refs(SPLIT_BY).p is not there, the first whose file is."""
    names = [usual_split(dataset), *SPLITS[dataset]]
    return next((name for name in names if refer_files(folder / dataset, name)[0].is_file()), names[0])


def make_lists(
    folder: Path,
    dataset: str,
    split_by: str,
    image_root: Path | None = None,
    keep_repeated: bool = True,
    skip_missing: bool = False,
) -> Lists:
    """Make the lists of a data set.

    An image has its name on disk: COCO_train2014_<12 digits of its id>.jpg, or for RefCLEF the file_name of its id in
    instances.json. The file names in refs(SPLIT_BY).p do not name image files.

    Args:
        folder: holds the folder `dataset`, as refcoco_data does in the configs.
        dataset, split_by: keys of `dataset.refer.SPLITS`.
        image_root: the folder of the images: each must be there or in a folder below (`images_on_disk`), and an entry
            has its path. None: an entry has its name, unchecked.
        keep_repeated: write equal sentences of a ref as often as they stand there, as published counts do; else once.
        skip_missing: leave out refs whose image is not under image_root, instead of raising.

    Raises:
        DataError: files that cannot be used; all kinds of problems of the refs in one message.
    """
    lists = Lists(counts={split: SplitCount() for split in splits_of(dataset, split_by)})
    for path in refer_files(folder / dataset, split_by):
        if not path.is_file():
            others = sorted(other.name for other in path.parent.glob("refs(*).p"))
            there = f"; there is {', '.join(others)}, see --split-by" if others and path.suffix == ".p" else ""
            raise DataError(
                f"{path}: does not exist{there}; {folder} must hold {dataset}/ as it is in REFER's {dataset}.zip"
            )
    making = _Making(
        refer=load_refer(folder / dataset, split_by),
        by_file_name=dataset in NAMED_BY_FILE,
        on_disk=None if image_root is None else images_on_disk(image_root),
        keep_repeated=keep_repeated,
        skip_missing=skip_missing,
    )
    problems = Problems()
    for index, ref in enumerate(making.refer.refs.values()):
        with problems.at(f"{making.refer.refs_file}: ref {index} (ref_id {ref['ref_id']})"):
            _add_ref(ref, making, lists)
    problems.check()
    return lists


def _add_ref(ref: dict[str, Any], making: _Making, lists: Lists) -> None:
    part, image = part_of(ref["split"]), _image(ref, making, lists)
    making.refer.box(ref)
    count = lists.counts.setdefault(ref["split"], SplitCount())
    count.refs += 1
    seen: set[str] = set()
    for sentence in require(ref, "sentences", list):
        text = require(sentence, "sent", str)
        count.sentences += 1
        if image is None:
            count.missing += 1
            continue
        count.empty += not has_content(clean_caption(text, MAX_WORDS))
        count.repeated += text in seen
        if text not in seen or making.keep_repeated:
            seen.add(text)
            count.expressions += 1
            row = {"image": image, "text": text, "ref_id": ref["ref_id"], "split": ref["split"]}
            lists.parts[part].append(row)


def part_of(split: str) -> str:
    """The one of `PARTS` that a split belongs to: "test" holds testA, testB, testC and test."""
    if split in ("train", "val"):
        return split
    if split.startswith("test"):
        return "test"
    raise EntryProblem("the ref's split is none of train, val and test...", repr(split)[:60])


def _image(ref: dict[str, Any], making: _Making, lists: Lists) -> str | None:
    """The path of a ref's image, below image_root if that is given; None: it is missing, and noted in `lists`."""
    refer, image_id = making.refer, ref["image_id"]
    detail = f"image_id {image_id}"
    if image_id not in refer.images:
        raise EntryProblem(
            f"the ref's image is not in {refer.instances_file}; it must belong to {refer.refs_file.name}", detail
        )
    name = require(refer.images[image_id], "file_name", str) if making.by_file_name else COCO_FILE_NAME.format(image_id)
    if making.on_disk is None:
        return name
    path = making.on_disk.get(Path(name).name)
    if path is not None:
        return path
    if making.skip_missing:
        lists.missing[image_id] = name
        return None
    if making.by_file_name and image_id in NOT_IN_SAIAPR:
        raise EntryProblem(
            "the ref's image is not under --image-root, and REFER's archive of SAIAPR is known to lack it; "
            "--skip-missing leaves it out",
            f"{detail}, {name}",
        )
    raise EntryProblem(
        "the ref's image is not under --image-root; check the folder, or leave such refs out by --skip-missing",
        f"{detail}, {name}",
    )


def images_on_disk(root: Path) -> dict[str, str]:
    """The .jpg files of a folder, its subfolders, and their folders images/: file name -> path relative to the folder.

    So image_root may also be the folder above COCO's train2014/ or SAIAPR's 00/images/. Of equal names the nearest
    counts, then the first in alphabetical order. Raises `DataError` if there is none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder; --image-root must be the one that holds the images")
    below = sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
    found: dict[str, str] = {}
    for folder in (root, *below, *(path / "images" for path in below)):
        for path in folder.glob("[!.]*.jpg"):
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
        instances: REFER's instances.json: its images without a detection get an empty list. Evaluation stops at an
            image that has no entry.

    Raises:
        DataError: a file that cannot be used; all kinds of problems of the entries in one message.
    """
    found: dict[int, list[list[float]]] = {}
    if instances is not None:
        found = {image_id: [] for image_id in _image_ids(instances)}
    problems = Problems()
    rows = _load(file, list)
    for index, row in enumerate(rows):
        with problems.at(f"{file}: entry {index}"):
            box = require(row, "box", list)
            if not is_box(box):
                raise EntryProblem("key 'box' must be four finite numbers [x, y, w, h]", f"found {box!r:.60}")
            found.setdefault(_image_id(row), []).append(box)
    problems.check()
    if not rows:
        raise DataError(f"{file}: holds no detections")
    return {str(image_id): found[image_id] for image_id in sorted(found)}


def _image_id(row: dict[str, Any]) -> int:
    """The image id of a detection, an integer or one written as a string."""
    value = row.get("image_id")
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    return require(row, "image_id", int)


def _image_ids(instances: Path) -> list[int]:
    rows = _load(instances, dict).get("images")
    if not isinstance(rows, list):
        raise DataError(f"{instances}: key 'images' must be a list; is this REFER's instances.json?")
    with Problems() as problems:
        return list(by_id(rows, f"{instances}: images entry", problems, int))


def _load(path: Path, kind: type) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: does not exist; check the path")
    return load_json(path, kind)
