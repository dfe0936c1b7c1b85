"""Flickr30k Entities as info-ground writes it (Plummer et al., ICCV 2015; docs/method.md, Data formats).

Three files a split: image ids, one a line; {image_id: {"boxes": {phrase_id: [[x1, y1, x2, y2], ...]}, "width",
"height"}}; {image_id: [{"phrases": [{"phrase", "phrase_id", "phrase_type"}]}]}, a list of sentences.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
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
    locate,
    parse_boxes,
    require,
)
from dataset.images import LONGEST_SIDE
from dataset.reading import DataError, load_json, read_text

MAX_PHRASE_WORDS = 50  # the release cuts a phrase here
NOT_VISUAL = "0"  # the phrase id that Flickr30k Entities gives to all phrases that nothing in the image stands for
UNKNOWN_PHRASE = "the phrase's id has no boxes and is not under 'scene' or 'nobox'; evaluation leaves the phrase out"


class ImageBoxes(NamedTuple):
    """What the box file says of one image.

    Args:
        size: (height, width) in pixels.
        by_id: phrase id -> its boxes (n, 4) float64 [x, y, w, h], n >= 1.
        boxless: the phrase ids that the file lists as a scene or as without a box, and `NOT_VISUAL`.
    """

    size: tuple[int, int]
    by_id: dict[str, np.ndarray]
    boxless: set[str]


def read_flickr(config: GroundingConfig, reading: Reading) -> list[Expression]:
    """Every (sentence, phrase) whose phrase id has boxes, in the order of ids, sentences and phrases.

    Each phrase is grounded alone, in `<image_root>/<id>.jpg`. Its ref_id is its index in this order, over all files.

    Raises:
        DataError: the lists of files are not of equal length.
    """
    keys = "image_ids_file", "phrase_box_file", "sentences_file"
    config.require(*keys)
    files = [getattr(config, key) for key in keys]
    if len(set(map(len, files))) > 1:
        raise DataError(
            "image_ids_file, phrase_box_file and sentences_file must be lists of equal length, one entry a split; they "
            "have {}, {} and {} entries".format(*map(len, files))
        )
    splits = zip(*files, strict=True)
    found = [one for names in splits for one in reading.once(_read_split, *names, config.image_root)]
    return [replace(one, ref_id=index) for index, one in enumerate(found)]


def _read_split(
    reading: Reading, ids_file: str, box_file: str, sentences_file: str, image_root: str
) -> list[Expression]:
    """The expressions of a split, from its three files."""
    ids: list[str] = []
    boxes: dict[str, ImageBoxes] = {}
    found: list[Expression] = []
    split = split_of(ids_file)
    with reading.file(ids_file, "image ids", "image_ids_file") as file:
        ids = read_ids(ids_file, file.problems, image_root)
        file.count = len(ids)
        file.holds = f"image ids ({split})"
        if split == "test" and "val" in ids_file:
            counts = "counts as test, by its file name; the release would count it as val"
            file.notes.append(f"{ids_file} {counts}, because its path contains 'val'")
        for image_id in ids:
            file.says(f"{ids_file}: image {image_id}", image_path(image_root, image_id))
    with reading.file(box_file, "images with boxes", "phrase_box_file") as file:
        boxes = _read_boxes(file, ids, image_root)
        file.count = len(boxes)
    with reading.file(sentences_file, "phrases with boxes", "sentences_file") as file:
        sentences = load_json(sentences_file, dict)
        for image_id in ids:
            for where, row in _phrases(sentences, image_id, file):
                with file.problems.at(where):
                    found += _expression(file, where, row, image_path(image_root, image_id), boxes.get(image_id), split)
        file.count = len(found)
        if boxes and not found:
            file.fail("no phrase has boxes; do the files match?")
    return found


def image_path(image_root: str, image_id: str) -> Path:
    """Where the image of an id is; raises `EntryProblem` for an id that `read_ids` leaves out."""
    return locate(image_root, f"{image_id}.jpg")


def split_of(ids_file: str) -> str:
    """ "val" when the file's own name contains 'val', else "test".

    The release looks for 'val' in the whole path, so that a folder named eval/ makes its test split count as val.
    """
    return "val" if "val" in Path(ids_file).name else "test"


def load_ids(path: str, image_root: str = ".") -> list[str]:
    """Read the image ids of a split file, one a line; raises `DataError`, also for what `read_ids` notes."""
    with Problems() as problems:
        return read_ids(path, problems, image_root)


def read_ids(path: str, problems: Problems, image_root: str = ".") -> list[str]:
    """As `load_ids`, but notes repeated ids, which count once, and ids like '../1', which are left out."""
    counts = Counter(read_text(path, "image_ids_file").split())
    if not counts:
        raise DataError(f"{path}: lists no image ids")
    ids = []
    for image_id, count in counts.items():
        if count > 1:
            kind = "the image id is listed more than once; leave out the repeated lines"
            problems.add(f"{path}: image {image_id}", kind, f"{count} times")
        try:
            image_path(image_root, image_id)
            ids.append(image_id)
        except EntryProblem:
            problems.add(path, "an image id is absolute or leads out of its folder", repr(image_id)[:200])
    return ids


def _read_boxes(file: DataFile, ids: list[str], image_root: str) -> dict[str, ImageBoxes]:
    """What a box file says of each image; notes what cannot be used. Raises `DataError` for the file itself."""
    content, found = load_json(file.name, dict), {}
    for image_id in ids:
        where, image = f"{file.name}: image {image_id}", image_path(image_root, image_id)
        with file.problems.at(where):
            found[image_id] = of = _image_boxes(content, image_id)
            file.says(where, image, size=of.size)
            for phrase_id, boxes in of.by_id.items():
                file.says(f"{where}, phrase id {phrase_id}", image, boxes=boxes, size=of.size)
    return found


def _image_boxes(content: dict[str, Any], image_id: str) -> ImageBoxes:
    if image_id not in content:
        raise EntryProblem("the image id has no entry; check that phrase_box_file belongs to image_ids_file")
    row = content[image_id]
    size = require(row, "height", int), require(row, "width", int)
    if not all(1 <= side <= LONGEST_SIDE for side in size):
        kind = f"keys 'height' and 'width' must be the image's pixels, 1 to {LONGEST_SIDE:,}; correct the entry"
        raise EntryProblem(kind, f"found {size[0]} and {size[1]}")
    by_id = {}
    for phrase_id, corners in require(row, "boxes", dict).items():
        found = parse_boxes(corners, "the boxes of a phrase id")
        found[:, 2:] -= found[:, :2]
        if len(found):
            by_id[phrase_id] = found
    boxless = [row[key] for key in ("scene", "nobox") if isinstance(row.get(key), list)]
    return ImageBoxes(size, by_id, {NOT_VISUAL, *(str(phrase_id) for ids in boxless for phrase_id in ids)})


def _phrases(sentences: dict[str, Any], image_id: str, file: DataFile) -> Iterator[tuple[str, Any]]:
    """Yield each phrase of an image's sentences, with where it stands; notes sentences that cannot be used."""
    where = f"{file.name}: image {image_id}"
    if type(sentences.get(image_id)) is not list:
        kind = "the image id has no list of sentences; check that sentences_file belongs to image_ids_file"
        file.problems.add(where, kind)
        return
    for i, sentence in enumerate(sentences[image_id]):
        with file.problems.at(f"{where}, sentence {i}"):
            for j, row in enumerate(require(sentence, "phrases", list)):
                yield f"{where}, sentence {i}, phrase {j}", row


def _expression(
    file: DataFile, where: str, row: Any, image: Path, of: ImageBoxes | None, split: str
) -> list[Expression]:
    """The expression of a phrase; none where the phrase id has no boxes, or where nothing is known of the image."""
    phrase_id = require(row, "phrase_id", str)
    if of is None:
        return []
    if phrase_id not in of.by_id:
        if phrase_id not in of.boxless:
            file.remarks.add(where, UNKNOWN_PHRASE, f"phrase_id {phrase_id}")
        return []
    text = file.clean(where, require(row, "phrase", str), MAX_PHRASE_WORDS)
    record = {"image_height": of.size[0], "image_width": of.size[1], "split": split}
    answers, types = of.by_id[phrase_id], _types(row)
    return [Expression(image, text, 0, split, answers, record, annotated_size=of.size, categories=types)]


def _types(phrase: dict[str, Any]) -> tuple[str, ...]:
    """The phrase's types ("people", "clothing", ...), if the file tells them."""
    types = phrase.get("phrase_type")
    return tuple(filter(is_text, types)) if type(types) is list else ()
