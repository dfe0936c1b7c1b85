"""REFER's raw files -> lists of expressions; MAttNet's detections -> dets.json (docs/method.md, Data formats).

REFER (Yu et al., ECCV 2016; Kazemzadeh et al., EMNLP 2014): `<dataset>/refs(SPLIT_BY).p` and instances.json. A list
holds {"image", "text", "ref_id", "split"}, in the order of the refs and their sentences, as dataset/refer.py reads it.
MAttNet (Yu et al., CVPR 2018): a list of {"det_id", "box": [x, y, w, h], "image_id", "category_name", "score", ...}.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.expressions import EntryProblem, Problems, is_box, require
from dataset.raw.archives import is_hidden, require_file
from dataset.raw.evaluation_images import EvaluationImages
from dataset.reading import DataError, load_json
from dataset.refer import MAX_WORDS, SPLITS, Refer, load_refer, read_instances, refer_files, splits_of
from dataset.text import clean_caption, has_content
from terminal import aligned
from utils import write_text

PARTS = ("train", "val", "test")  # one file each; "test" holds every testing split
COCO_FILE_NAME = "COCO_train2014_{:012d}.jpg"
NAMED_BY_FILE = ("refclef",)  # its images are SAIAPR's, named in instances.json; the others are COCO's, named by id
USUAL_SPLITS = {**{name: next(iter(owners)) for name, owners in SPLITS.items()}, "refclef": "berkeley"}  # as published
# Ids of images that every copy of REFER's SAIAPR archive lacks or holds broken.
NOT_IN_SAIAPR = {17975, 19575, 19579}
SHOWN_MISSING = 5
# What is counted of a split: its refs and their sentences; sentences equal to an earlier one of their ref, sentences of
# which cleaning leaves nothing (written, as the published counts include them), and sentences of refs without an image,
# which count in none of the others but `sentences`; and the entries written.
COUNTS = ("refs", "sentences", "repeated", "empty", "missing", "expressions")


@dataclass
class Lists:
    """What `make_lists` makes.

    Args:
        refer: what it was made of.
        counts: split -> how many there are of each of `COUNTS`.
        parts: the entries of each of `PARTS`.
        missing: image id -> name of each image that is not on disk.
    """

    refer: Refer
    counts: dict[str, Counter[str]]
    parts: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {part: [] for part in PARTS})
    missing: dict[int, str] = field(default_factory=dict)

    def table(self) -> str:
        """One line per split; if images are missing, how many sentences they have, and the first of them."""
        names = [name for name in COUNTS if name != "missing" or self.missing]
        rows = [[split, *(str(count[name]) for name in names)] for split, count in self.counts.items()]
        lines = [aligned([["split", *names], *rows])]
        if self.missing:
            first = ", ".join(list(self.missing.values())[:SHOWN_MISSING])
            more = f" and {len(self.missing) - SHOWN_MISSING:,} more" if len(self.missing) > SHOWN_MISSING else ""
            lines.append(f"left out, not under --image-root: {len(self.missing):,} images ({first}{more})")
        return "\n".join(lines)


def default_split(folder: Path, dataset: str) -> str:
    """Whose split the published numbers use; if its refs(SPLIT_BY).p is not there, the first whose file is."""
    names = [USUAL_SPLITS[dataset], *SPLITS[dataset]]
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
    counts: dict[str, Counter[str]] = {split: Counter() for split in splits_of(dataset, split_by)}
    for path in refer_files(folder / dataset, split_by):
        others = ", ".join(sorted(other.name for other in path.parent.glob("refs(*).p")))
        there = f"there is {others}, see --split-by; " if others and path.suffix == ".p" else ""
        require_file(path, f"{there}{folder} must hold {dataset}/ as it is in REFER's {dataset}.zip")
    refer = load_refer(folder / dataset, split_by)
    lists = Lists(refer, counts)
    on_disk = None if image_root is None else images_on_disk(image_root)
    with Problems() as problems:
        for index, ref in enumerate(refer.refs.values()):
            with problems.at(f"{refer.refs_file}: ref {index} (ref_id {ref['ref_id']})"):
                part, image_id = part_of(ref["split"]), ref["image_id"]
                name = image_name(ref, refer, dataset in NAMED_BY_FILE)
                image = name if on_disk is None else on_disk.get(Path(name).name)
                if image is None and not skip_missing:
                    known = dataset in NAMED_BY_FILE and image_id in NOT_IN_SAIAPR
                    remedy = "REFER's archive of SAIAPR is known to lack it" if known else "check the folder"
                    kind = f"the ref's image is not under --image-root: {remedy}; --skip-missing leaves such refs out"
                    raise EntryProblem(kind, f"image_id {image_id}, {name}")
                if image is None:
                    lists.missing[image_id] = name
                refer.box(ref)  # there is one
                count = lists.counts.setdefault(ref["split"], Counter())
                count["refs"] += 1
                lists.parts[part] += _entries(ref, image, keep_repeated, count)
    return lists


def _entries(ref: dict[str, Any], image: str | None, keep_repeated: bool, count: Counter[str]) -> list[dict[str, Any]]:
    """The entries of a ref's sentences, none without an image; adds to the counts of its split."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for sentence in require(ref, "sentences", list):
        text = require(sentence, "sent", str)
        count["sentences"] += 1
        if image is None:
            count["missing"] += 1
            continue
        count["empty"] += not has_content(clean_caption(text, MAX_WORDS))
        count["repeated"] += text in seen
        if text not in seen or keep_repeated:
            rows.append({"image": image, "text": text, "ref_id": ref["ref_id"], "split": ref["split"]})
        seen.add(text)
    count["expressions"] += len(rows)
    return rows


def part_of(split: str) -> str:
    """The one of `PARTS` that a split belongs to: "test" holds testA, testB, testC and test."""
    if split in ("train", "val"):
        return split
    if split.startswith("test"):
        return "test"
    raise EntryProblem("the ref's split is none of train, val and test...", repr(split)[:60])


def image_name(ref: dict[str, Any], refer: Refer, by_file_name: bool) -> str:
    """The name on disk of a ref's image; raises `EntryProblem` if instances.json does not have the image."""
    image_id = ref["image_id"]
    if image_id not in refer.images:
        kind = f"the ref's image is not in {refer.instances_file}; it must belong to {refer.refs_file.name}"
        raise EntryProblem(kind, f"image_id {image_id}")
    return require(refer.images[image_id], "file_name", str) if by_file_name else COCO_FILE_NAME.format(image_id)


def images_on_disk(root: Path) -> dict[str, str]:
    """The .jpg files of a folder, its subfolders, and their folders images/: file name -> path relative to the folder.

    So image_root may also be the folder above COCO's train2014/ or SAIAPR's 00/images/. Of equal names the nearest
    counts, then the first in alphabetical order. Raises `DataError` if there is none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder; --image-root must be the one that holds the images")
    found: dict[str, str] = {}
    for pattern in ("*.jpg", "*/*.jpg", "*/images/*.jpg"):
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            if not is_hidden(name):
                found.setdefault(path.name, name)
    if not found:
        raise DataError(f"{root}: holds no .jpg; --image-root must be the folder of the images")
    return found


def write_lists(out: Path, dataset: str, lists: Lists) -> None:
    """Write <dataset>_{train,val,test}.json; a part that the data set does not have is an empty list."""
    for part, rows in lists.parts.items():
        write_text(out / f"{dataset}_{part}.json", json.dumps(rows) + "\n")


# ---- training


def training_entries(
    lists: Lists, dataset: str, exclude: Sequence[EvaluationImages], masks: bool = False
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The train split as entries of dataset/vg.py: one a ref, with its sentences, each once, and its box.

    Sentences of which cleaning leaves nothing are left out.

    Args:
        exclude: of other data sets, whose val and test images are left out as the data set's own are.
        masks: the segmentation of instances.json in place of the box.

    Returns:
        the entries, and how many refs there are, were left out, and why.

    Raises:
        DataError: no entry is left; or segmentations that cannot be used, all in one message.
    """
    refer, entries = lists.refer, []
    others = {ref["image_id"] for ref in refer.refs.values() if part_of(ref["split"]) != "train"}
    held = {f"left out, in val or test of {refer.refs_file}": others}
    held |= {f"left out, of {each.path}": set(_ids_of(each, dataset)) for each in exclude}
    held |= {"left out, not under --image-root": set(lists.missing)} if lists.missing else {}
    empty = "left out, without a text"
    counts = Counter(dict.fromkeys(("refs", *held, empty, "entries"), 0))
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in lists.parts["train"]:
        rows.setdefault(row["ref_id"], []).append(row)
    with Problems() as problems:
        for ref_id, ref in ((key, ref) for key, ref in refer.refs.items() if part_of(ref["split"]) == "train"):
            sentences = rows.get(ref_id, [])
            texts = dict.fromkeys(row["text"] for row in sentences)
            captions = [text for text in texts if has_content(clean_caption(text, MAX_WORDS))]
            reasons = [reason for reason, ids in held.items() if ref["image_id"] in ids] + [empty] * (not captions)
            counts.update(["refs", *(reasons[:1] or ["entries"])])
            with problems.at(f"{refer.refs_file}: ref_id {ref_id}"):
                if reasons:
                    continue
                entry = {"image": sentences[0]["image"], "caption": captions}
                if masks:
                    refer.region(ref)  # which checks it
                    entries.append(entry | {"segmentation": [refer.annotations[ref["ann_id"]]["segmentation"]]})
                else:
                    ((x, y, w, h),) = refer.box(ref).tolist()
                    entries.append(entry | {"bbox": [[x, y, x + w, y + h]]})
    if not entries:
        raise DataError(f"{refer.refs_file}: no ref of the train split is left ({dict(counts)})")
    return entries, counts


def _ids_of(images: EvaluationImages, dataset: str) -> frozenset[int]:
    """The ids of evaluation images in the collection of a data set; raises `DataError` where there are none."""
    found = images.saiapr if dataset in NAMED_BY_FILE else images.coco
    if not found:
        collection = "SAIAPR, as RefCLEF's in its refs(...).p" if dataset in NAMED_BY_FILE else "COCO"
        raise DataError(f"{images.path}: has no val or test images of {collection}, so it can leave out nothing")
    return found


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
    for path in (file, instances):
        if path is not None:
            require_file(path, "check the path")
    rows = load_json(file, list)
    with Problems() as problems:
        if instances is not None:
            found = {image_id: [] for image_id in read_instances(instances, problems)[1]}
        for index, row in enumerate(rows):
            with problems.at(f"{file}: entry {index}"):
                box = require(row, "box", list)
                if not is_box(box):
                    raise EntryProblem("key 'box' must be four finite numbers [x, y, w, h]", f"found {box!r:.60}")
                image_id = row.get("image_id")
                written = isinstance(image_id, str) and re.fullmatch("[0-9]{1,18}", image_id)
                found.setdefault(int(image_id) if written else require(row, "image_id", int), []).append(box)
    if not rows:
        raise DataError(f"{file}: holds no detections")
    return {str(image_id): found[image_id] for image_id in sorted(found)}
