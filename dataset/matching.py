"""Balanced image-text pairs for measuring how well a model matches: [{"image", "text", "match": 1 or 0, "kind"?}].

Every second pair is false; chance is 0.5. Not part of the published benchmarks: a map explains a match, so a model that
cannot match has nothing to explain.
"""

from pathlib import Path
from typing import NamedTuple

from dataset.expressions import EntryProblem, Problems, check_images, clean_text, require
from dataset.reading import DataError, load_json


class Pair(NamedTuple):
    """A cleaned text and an image; `match` says whether it is true of it; `kind` groups pairs in the report."""

    image: Path
    text: str
    match: bool
    kind: str


def load_pairs(file: str, image_root: str, max_words: int = 50) -> list[Pair]:
    """Read and check one file of pairs; raises `DataError` naming file and entries."""
    pairs: list[Pair] = []
    images: list[tuple[Path, str]] = []
    problems = Problems()
    for index, row in enumerate(load_json(file, list)):
        where = f"{file}: entry {index}"
        try:
            image = Path(image_root) / require(row, "image", str)
            match = require(row, "match", int)
            if match not in (0, 1):
                raise EntryProblem("key 'match' must be 0 or 1", f"found {match}")
            text = clean_text(require(row, "text", str), max_words)
            pairs.append(Pair(image, text, bool(match), str(row.get("kind", "pair"))))
            images.append((image, where))
        except EntryProblem as problem:
            problems.add(where, problem)
    check_images(images, problems)
    problems.check()
    if not pairs:
        raise DataError(f"{file}: holds no pairs")
    return pairs
