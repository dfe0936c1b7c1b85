"""Flickr30k Entities as info-ground writes it (Plummer et al., ICCV 2015; SPEC section 4): phrases and their boxes.

Three files a split: image ids, one a line; {image_id: {"boxes": {phrase_id: [[x1, y1, x2, y2], ...]}, "width",
"height"}}; {image_id: [{"phrases": [{"phrase", "phrase_id", "phrase_type"}]}]}, a list of sentences.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset.expressions import EntryProblem, Expression, Problems, check_images, clean_text, parse_boxes, require
from dataset.reading import DataError, load_json
from utils import log


def load_expressions(
    *,
    image_ids_file: list[str],
    phrase_box_file: list[str],
    sentences_file: list[str],
    image_root: str,
    max_words: int = 50,
) -> list[Expression]:
    """Read and check every (sentence, phrase) whose phrase id has boxes, in the order of ids, sentences and phrases.

    Each phrase is grounded alone, in `<image_root>/<id>.jpg`; its ref_id is its index in this order, over all files.

    Raises:
        DataError: files or entries that cannot be used; all kinds of problems of the entries in one message.
    """
    if not len(image_ids_file) == len(phrase_box_file) == len(sentences_file):
        raise DataError(
            "image_ids_file, phrase_box_file and sentences_file must be lists of equal length, one entry a split; they "
            f"have {len(image_ids_file)}, {len(phrase_box_file)} and {len(sentences_file)} entries"
        )
    expressions: list[Expression] = []
    images: list[tuple[Path, str]] = []
    problems = Problems()
    for ids_file, box_file, sentence_file in zip(image_ids_file, phrase_box_file, sentences_file, strict=True):
        split = split_of(ids_file)
        boxes, sentences = load_json(box_file, dict), load_json(sentence_file, dict)
        for image_id in load_ids(ids_file):
            image = Path(image_root) / f"{image_id}.jpg"
            images.append((image, f"{ids_file}: image {image_id}"))
            try:
                size, boxes_by_id = _image_boxes(boxes, image_id)
            except EntryProblem as problem:
                problems.add(f"{box_file}: image {image_id}", problem)
                continue
            record = {"image_height": size[0], "image_width": size[1], "split": split}
            for where, phrase in _phrases(sentences, image_id, sentence_file, problems):
                try:
                    phrase_id = require(phrase, "phrase_id", str)
                    if phrase_id in boxes_by_id:
                        text = clean_text(require(phrase, "phrase", str), max_words)
                        found = boxes_by_id[phrase_id]
                        item = Expression(image, text, len(expressions), split, found, dict(record))
                        expressions.append(replace(item, size=size, categories=_types(phrase)))
                except EntryProblem as problem:
                    problems.add(where, problem)
    check_images(images, problems)
    problems.check()
    if not expressions:
        raise DataError(f"{', '.join(image_ids_file) or 'image_ids_file'}: no phrase has boxes; do the files match?")
    return expressions


def split_of(ids_file: str) -> str:
    """ "val" when the file's own name contains 'val', else "test"; says so where the release decides otherwise.

    The release looks for 'val' in the whole path, so that a folder named eval/ makes its test split count as val.
    """
    split, release = ("val" if "val" in name else "test" for name in (Path(ids_file).name, str(ids_file)))
    if split != release:
        log(
            f"warning: {ids_file} counts as {split}, by its file name; the release would count it as {release}, "
            "because its path contains 'val'"
        )
    return split


def load_ids(path: str) -> list[str]:
    """The image ids of a split file, one a line, blank lines left out; raises `DataError`."""
    try:
        ids = Path(path).read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check image_ids_file in the config") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file ({error}); it must list image ids, one a line") from error
    if not ids:
        raise DataError(f"{path}: lists no image ids")
    return ids


def _image_boxes(boxes: dict[str, Any], image_id: str) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
    """The size (height, width) of an image, and by phrase id its boxes (n, 4) [x, y, w, h], where it has any."""
    if image_id not in boxes:
        raise EntryProblem("the image id has no entry; check that phrase_box_file belongs to image_ids_file")
    row = boxes[image_id]
    size = require(row, "height", int), require(row, "width", int)
    by_id = {}
    for phrase_id, corners in require(row, "boxes", dict).items():
        found = parse_boxes(corners, "the boxes of a phrase id")
        found[:, 2:] -= found[:, :2]
        if len(found):
            by_id[phrase_id] = found
    return size, by_id


def _types(phrase: dict[str, Any]) -> tuple[str, ...]:
    """The phrase's types ("people", "clothing", ...), if the file tells them."""
    types = phrase.get("phrase_type")
    return tuple(name for name in types if type(name) is str) if type(types) is list else ()


def _phrases(sentences: dict[str, Any], image_id: str, file: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Each phrase of an image's sentences, with where it stands; notes sentences that cannot be used."""
    if type(sentences.get(image_id)) is not list:
        kind = "the image id has no list of sentences; check that sentences_file belongs to image_ids_file"
        problems.add(f"{file}: image {image_id}", EntryProblem(kind))
        return
    for i, sentence in enumerate(sentences[image_id]):
        where = f"{file}: image {image_id}, sentence {i}"
        try:
            phrases = require(sentence, "phrases", list)
        except EntryProblem as problem:
            problems.add(where, problem)
            continue
        for j, phrase in enumerate(phrases):
            yield f"{where}, phrase {j}", phrase
