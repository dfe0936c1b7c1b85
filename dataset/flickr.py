"""Flickr30k Entities as info-ground writes it (Plummer et al., ICCV 2015; docs/method.md, Data formats).

Three files a split: image ids, one a line; {image_id: {"boxes": {phrase_id: [[x1, y1, x2, y2], ...]}, "width",
"height"}}; {image_id: [{"phrases": [{"phrase", "phrase_id", "phrase_type"}]}]}, a list of sentences.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.expressions import (
    EntryProblem,
    Expression,
    Problems,
    check_images,
    clean_text,
    is_text,
    locate,
    parse_boxes,
    require,
)
from dataset.images import LONGEST_SIDE
from dataset.reading import DataError, load_json, read_text
from utils import log

MAX_PHRASE_WORDS = 50  # the release cuts a phrase here


class ImageBoxes(NamedTuple):
    """What the box file says of one image.

    Args:
        size: (height, width) in pixels.
        by_id: phrase id -> its boxes (n, 4) float64 [x, y, w, h], n >= 1.
        boxless: the phrase ids that the file lists as a scene or as without a box.
    """

    size: tuple[int, int]
    by_id: dict[str, np.ndarray]
    boxless: frozenset[str]


class FlickrPhrase(NamedTuple):
    """One (sentence, phrase) and where it stands; `expression` is None where its id has no boxes."""

    where: str
    image_id: str
    phrase_id: str
    expression: Expression | None


def load_expressions(
    *,
    image_ids_file: list[str],
    phrase_box_file: list[str],
    sentences_file: list[str],
    image_root: str,
    skip_missing: bool = False,
) -> list[Expression]:
    """Read and check every (sentence, phrase) whose phrase id has boxes, in the order of ids, sentences and phrases.

    Each phrase is grounded alone, in `<image_root>/<id>.jpg`. Its ref_id is its index in this order, over all files.

    Args:
        skip_missing: do not look whether the images are there.

    Raises:
        DataError: files or entries that cannot be used; all kinds of problems of the entries in one message.
    """
    expressions: list[Expression] = []
    images: list[tuple[Path, str]] = []
    with Problems() as problems:
        for ids_file, box_file, phrases_file in triples(image_ids_file, phrase_box_file, sentences_file):
            split, ids = split_of(ids_file), read_ids(ids_file, problems, image_root)
            images += [(image_path(image_root, key), f"{ids_file}: image {key}") for key in ids]
            boxes = read_boxes(box_file, ids, problems)
            phrases = read_phrases(phrases_file, ids, boxes, split, image_root, problems, first=len(expressions))
            expressions += [phrase.expression for phrase in phrases if phrase.expression]
        if not skip_missing:
            check_images(images, problems)
    if not expressions:
        raise DataError(f"{', '.join(image_ids_file) or 'image_ids_file'}: no phrase has boxes; do the files match?")
    return expressions


def triples(
    image_ids_file: list[str], phrase_box_file: list[str], sentences_file: list[str]
) -> list[tuple[str, str, str]]:
    """The three files of each split; raises `DataError` where the lists are not of equal length."""
    if not len(image_ids_file) == len(phrase_box_file) == len(sentences_file):
        raise DataError(
            "image_ids_file, phrase_box_file and sentences_file must be lists of equal length, one entry a split; they "
            f"have {len(image_ids_file)}, {len(phrase_box_file)} and {len(sentences_file)} entries"
        )
    return list(zip(image_ids_file, phrase_box_file, sentences_file, strict=True))


def image_path(image_root: str, image_id: str) -> Path:
    """Where the image of an id is; raises `EntryProblem` for an id that `read_ids` leaves out."""
    return locate(image_root, f"{image_id}.jpg")


def split_of(ids_file: str, warn: Callable[[str], object] = lambda text: log(f"warning: {text}")) -> str:
    """ "val" when the file's own name contains 'val', else "test"; warns where the release decides otherwise.

    The release looks for 'val' in the whole path, so that a folder named eval/ makes its test split count as val.
    """
    split, release = ("val" if "val" in name else "test" for name in (Path(ids_file).name, str(ids_file)))
    if split != release:
        warn(
            f"{ids_file} counts as {split}, by its file name; the release would count it as {release}, "
            "because its path contains 'val'"
        )
    return split


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


def read_boxes(file: str, ids: list[str], problems: Problems) -> dict[str, ImageBoxes]:
    """What a box file says of each image; notes what cannot be used. Raises `DataError` for the file itself."""
    content, found = load_json(file, dict), {}
    for image_id in ids:
        with problems.at(f"{file}: image {image_id}"):
            found[image_id] = _image_boxes(content, image_id)
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
    return ImageBoxes(size, by_id, frozenset(str(phrase_id) for ids in boxless for phrase_id in ids))


def read_phrases(
    file: str,
    ids: list[str],
    boxes: dict[str, ImageBoxes],
    split: str,
    image_root: str,
    problems: Problems,
    first: int = 0,
) -> list[FlickrPhrase]:
    """Read every (sentence, phrase) of a split, with or without boxes, in order; notes those that cannot be used.

    `first` is the ref_id of the first expression. Raises `DataError` for the file itself.
    """
    phrases: list[FlickrPhrase] = []
    sentences, count = load_json(file, dict), first
    for image_id in ids:
        image, of = image_path(image_root, image_id), boxes.get(image_id)
        for where, row in _phrases(sentences, image_id, file, problems):
            with problems.at(where):
                expression, phrase_id = None, require(row, "phrase_id", str)
                if of and phrase_id in of.by_id:
                    text = clean_text(require(row, "phrase", str), MAX_PHRASE_WORDS, file, where, problems)
                    record = {"image_height": of.size[0], "image_width": of.size[1], "split": split}
                    answers, types = of.by_id[phrase_id], _types(row)
                    expression = Expression(
                        image, text, count, split, answers, record, annotated_size=of.size, categories=types
                    )
                    count += 1
                phrases.append(FlickrPhrase(where, image_id, phrase_id, expression))
    return phrases


def _phrases(sentences: dict[str, Any], image_id: str, file: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Yield each phrase of an image's sentences, with where it stands; notes sentences that cannot be used."""
    if type(sentences.get(image_id)) is not list:
        kind = "the image id has no list of sentences; check that sentences_file belongs to image_ids_file"
        problems.add(f"{file}: image {image_id}", kind)
        return
    for i, sentence in enumerate(sentences[image_id]):
        where = f"{file}: image {image_id}, sentence {i}"
        with problems.at(where):
            yield from ((f"{where}, phrase {j}", row) for j, row in enumerate(require(sentence, "phrases", list)))


def _types(phrase: dict[str, Any]) -> tuple[str, ...]:
    """The phrase's types ("people", "clothing", ...), if the file tells them."""
    types = phrase.get("phrase_type")
    return tuple(filter(is_text, types)) if type(types) is list else ()
