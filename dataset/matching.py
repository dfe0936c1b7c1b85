"""Balanced image-text pairs for measuring how well a model matches: [{"image", "text", "match": 1 or 0, "kind"?}].

Every second pair is false, so chance is 0.5. Not part of the published benchmarks: a map explains a match, so a model
that cannot match has nothing to explain.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset.expressions import SURROGATE, DataFile, EntryProblem, Reading, is_text, load, locate, require, shown

MAX_TEXT_WORDS = 50  # as many as of a training caption


class MatchingPair(NamedTuple):
    """A cleaned text and an image; `match`: the text is true of the image; `kind` groups pairs in the report."""

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
        text = file.clean(where, require(row, "text", str), MAX_TEXT_WORDS)
        kind = str(row.get("kind", "pair"))
        if not is_text(kind):
            raise EntryProblem(f"key 'kind' {SURROGATE}", shown(kind))
        file.says(where, image, text=text)
        return [MatchingPair(image, text, bool(match), kind)]

    return reading.entries(file, "image-text pairs", "matching_file", parse)
