"""Your own phrases and boxes, for evaluation: the benchmark `own`.

A file is a JSON list of entries, or JSON lines with one entry a line. An entry is an object with these keys:

    image            path of the image, below the config's image_root
    phrase, phrases  a text, or a list of texts; each is one expression
    box, boxes       [x, y, w, h] in pixels of the image, x and y of the upper left corner; or a list of such boxes, any
                     of which is right for each of the phrases
    split            optional: the split that the entry counts for; by default "test"
    category         optional: a word by which the report groups expressions

Other keys are ignored.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from config import GroundingConfig
from dataset.expressions import (
    DataFile,
    EntryProblem,
    Expression,
    Reading,
    is_box,
    list_rows,
    locate,
    require,
    shown,
)
from dataset.reading import read_text
from files import parse_json

MAX_WORDS = 50  # of a phrase, as for Flickr30k
SPLIT = "test"  # of an entry that names none


def read_own(config: GroundingConfig, reading: Reading) -> list[Expression]:
    """The expressions of the test files, phrase by phrase; a ref_id is the index in this order."""
    config.require("test_file")
    found = [one for file in config.test_file for one in reading.once(_read_file, file, config.image_root)]
    return [replace(one, ref_id=index) for index, one in enumerate(found)]


def _read_file(reading: Reading, file: str, image_root: str) -> list[Expression]:
    def parse(file: DataFile, where: str, row: Any) -> list[Expression]:
        image = locate(image_root, require(row, "image", str))
        key, phrases = _one_or_more(row, "phrase", "phrases")
        texts = [require({key: phrase}, key, str) for phrase in phrases]
        texts = [file.clean(where, text, MAX_WORDS) for text in texts]
        boxes, split = _boxes(row), _split(row)
        categories = (require(row, "category", str),) if "category" in row else ()
        record = {"image_path": row["image"], "split": split}
        for text in texts:
            file.says(where, image, text=text)
        file.says(where, image, boxes=boxes)
        return [Expression(image, text, 0, split, boxes, record, categories=categories) for text in texts]

    return reading.entries(file, "expressions", "test_file", parse, _rows)


def _rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    """The entries of a file, a JSON list or JSON lines, each with where it stands; notes lines that are no JSON."""
    text = read_text(file.name, "test_file")
    if not text.lstrip().startswith("{"):
        yield from list_rows(file)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file.name}: line {number}"
            try:
                yield where, parse_json(line)
            except json.JSONDecodeError as error:
                kind = "the line is not valid JSON; write one entry {...} a line, or a JSON list of entries"
                file.problems.add(where, kind, str(error))
            except ValueError as error:
                file.problems.add(where, str(error))


def _one_or_more(row: dict[str, Any], one: str, many: str) -> tuple[str, list[Any]]:
    """Which of two keys an entry has, and its values: `one` has a single value, `many` has a list."""
    if (one in row) == (many in row):
        kind = f"an entry needs one of the keys '{one}' and '{many}'"
        raise EntryProblem(kind, "it has both" if one in row else f"its keys are {shown(list(row))}")
    values = require(row, many, list) if many in row else [row[one]]
    if not values:
        raise EntryProblem(f"key '{many}' is an empty list; leave the entry out, or complete it")
    return many if many in row else one, values


def _boxes(row: dict[str, Any]) -> np.ndarray:
    """The boxes of an entry, float64 (n, 4) [x, y, w, h], n >= 1."""
    key, boxes = _one_or_more(row, "box", "boxes")
    for box in boxes:
        if not is_box(box) or min(box[2:]) <= 0:
            what = "a list of boxes, each" if key == "boxes" else "a box of"
            kind = f"key '{key}' must be {what} four numbers [x, y, width, height] in pixels, width and height above 0"
            raise EntryProblem(kind, f"found {shown(box)}")
    return np.array(boxes, np.float64)


def _split(row: dict[str, Any]) -> str:
    split = require(row, "split", str) if "split" in row else SPLIT
    if split in ("", "epoch"):
        raise EntryProblem("key 'split' must not be empty, nor 'epoch', which log.txt has for itself", shown(split))
    return split
