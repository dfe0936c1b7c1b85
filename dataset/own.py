"""Your own data, for evaluation: phrases and boxes (the benchmark `own`), and image-text pairs (`matching_file`).

A file of phrases is a JSON list of entries, or JSON lines with one entry a line. An entry is an object with these keys:

    image            path of the image, below the config's image_root
    phrase, phrases  a text, or a list of texts; each is one expression
    box, boxes       [x, y, w, h] in pixels of the image, x and y of the upper left corner; or a list of such boxes, any
                     of which is right for each of the phrases
    split            optional: the split that the entry counts for; by default "test"
    category         optional: a word by which the report groups expressions

Other keys are ignored. A file of pairs is a JSON list of {"image", "text", "match": 1 or 0, "kind"?}.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import GroundingConfig
from dataset.expressions import (
    SURROGATE,
    DataFile,
    EntryProblem,
    Expression,
    Reading,
    is_box,
    is_text,
    list_rows,
    load,
    locate,
    require,
    shown,
)
from dataset.reading import read_text
from files import parse_json

MAX_WORDS = 50  # of a phrase, as for Flickr30k, and of a text, as for a training caption
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


# ---- image-text pairs


class MatchingPair(NamedTuple):
    """A cleaned text and an image; `match`: the text is true of the image; `kind` groups pairs in the report.

    Pairs measure how well a model matches. In balanced files every second pair is false, so chance is 0.5. Not part of
    the published benchmarks: a map explains a match, so a model that cannot match has nothing to explain.
    """

    image: Path
    text: str
    match: bool
    kind: str


def load_pairs(file: str, image_root: str, skip_missing: bool = False) -> list[MatchingPair]:
    """Read and check one file of pairs, their images unless `skip_missing`; raises `DataError` naming the entries."""
    return load(partial(read_pairs, file=file, image_root=image_root), skip_missing)


def read_pairs(reading: Reading, file: str, image_root: str) -> list[MatchingPair]:
    def parse(file: DataFile, where: str, row: Any) -> list[MatchingPair]:
        image = locate(image_root, require(row, "image", str))
        match = require(row, "match", int)
        if match not in (0, 1):
            raise EntryProblem("key 'match' must be 0 or 1", f"found {match}")
        text = file.clean(where, require(row, "text", str), MAX_WORDS)
        kind = str(row.get("kind", "pair"))
        if not is_text(kind):
            raise EntryProblem(f"key 'kind' {SURROGATE}", shown(kind))
        file.says(where, image, text=text)
        return [MatchingPair(image, text, bool(match), kind)]

    return reading.entries(file, "image-text pairs", "matching_file", parse)
