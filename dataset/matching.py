"""Balanced image-text pairs for measuring how well a model matches: [{"image", "text", "match": 1 or 0, "kind"?}].

Every second pair is false, so chance is 0.5. Not part of the published benchmarks: a map explains a match, so a model
that cannot match has nothing to explain.
"""

from pathlib import Path
from typing import NamedTuple

from dataset.expressions import SURROGATE, EntryProblem, Problems, clean_text, is_text, locate, require, shown, usable
from dataset.reading import load_json

MAX_TEXT_WORDS = 50  # as many as of a training caption


class MatchingPair(NamedTuple):
    """A cleaned text and an image; `match`: the text is true of the image; `kind` groups pairs in the report."""

    image: Path
    text: str
    match: bool
    kind: str


def load_pairs(file: str, image_root: str, skip_missing: bool = False) -> list[MatchingPair]:
    """Read and check one file of pairs, their images unless `skip_missing`; raises `DataError` naming the entries."""
    problems = Problems()
    found = read_pairs(file, image_root, problems)
    return usable(found, problems, skip_missing, f"{file}: holds no pairs")


def read_pairs(file: str, image_root: str, problems: Problems) -> list[tuple[str, MatchingPair]]:
    """The pairs that can be used, each with where it stands; notes the others. Raises `DataError` for the file."""
    found: list[tuple[str, MatchingPair]] = []
    for index, row in enumerate(load_json(file, list)):
        where = f"{file}: entry {index}"
        with problems.at(where):
            image = locate(image_root, require(row, "image", str))
            match = require(row, "match", int)
            if match not in (0, 1):
                raise EntryProblem("key 'match' must be 0 or 1", f"found {match}")
            text = clean_text(require(row, "text", str), MAX_TEXT_WORDS, file, where, problems)
            kind = str(row.get("kind", "pair"))
            if not is_text(kind):
                raise EntryProblem(f"key 'kind' {SURROGATE}", shown(kind))
            found.append((where, MatchingPair(image, text, bool(match), kind)))
    return found
