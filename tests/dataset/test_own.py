"""One's own phrases and boxes: what comes out, and what each broken file says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from config import GroundingConfig
from dataset.expressions import Expression
from dataset.reading import DataError
from grounding.benchmarks import OWN

ENTRIES = [
    {"image": "a.png", "phrase": "The dog-house!", "box": [1, 2.5, 3, 4], "split": "val", "category": "house"},
    {"image": "in/b.png", "phrases": ["two men", "they"], "boxes": [[0, 0, 9, 9], [5, 5, 1, 1]], "id": 77},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "in/b.png"):
        Image.new("RGB", (9, 7)).save(tmp_path / name)
    return tmp_path


def load(root: Path, *texts: str, skip_missing: bool = False) -> list[Expression]:
    """What is read of files with these texts."""
    files = [root / f"own{number}.json" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return OWN.load(GroundingConfig(test_file=[str(file) for file in files], image_root=str(root)), skip_missing)


@pytest.mark.parametrize("form", ["list", "lines"])
def test_every_phrase_is_an_expression(root: Path, form: str) -> None:
    rows = [json.dumps(entry) for entry in ENTRIES]
    found = load(root, "\n\n".join(rows) + "\n" if form == "lines" else f"[{','.join(rows)}]")
    assert [(one.text, one.ref_id, one.split) for one in found] == [
        ("the dog house", 0, "val"),
        ("two men", 1, "test"),
        ("they", 2, "test"),
    ]
    assert [one.image for one in found] == [root / "a.png", root / "in/b.png", root / "in/b.png"]
    assert [one.boxes.tolist() for one in found] == [[[1, 2.5, 3, 4]], *[[[0, 0, 9, 9], [5, 5, 1, 1]]] * 2]
    assert found[0].boxes.dtype == np.float64
    assert [one.categories for one in found] == [("house",), (), ()]
    assert found[1].record == {"image_path": "in/b.png", "split": "test"}
    assert (found[0].size, found[0].detections) == ((7, 9), None)


def test_several_files_are_numbered_through(root: Path) -> None:
    found = load(root, *(json.dumps([entry]) for entry in reversed(ENTRIES)))
    assert [(one.ref_id, one.text) for one in found] == [(0, "two men"), (1, "they"), (2, "the dog house")]


GOOD = ENTRIES[0]
EITHER = "an entry needs one of the keys"
BOX = r"must be a box of four numbers \[x, y, width, height\] in pixels, width and height above 0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"key 'image' must be of type str - 1 found:\n.*entry 1 \(found None\)"),
        ({"image": "c.png"}, r"the image file does not exist; check image_root.*\n.*entry 1 \(.*c\.png\)"),
        ({"image": "../a.png"}, r"leads out of image_root"),
        ({"phrases": ["x"]}, rf"{EITHER} 'phrase' and 'phrases' - 1 found:\n.*entry 1 \(it has both\)"),
        ({"phrase": ...}, rf"{EITHER} 'phrase' and 'phrases'.*\n.*entry 1 \(its keys are \['image', 'box', "),
        ({"phrase": 3}, r"key 'phrase' must be of type str.*\n.*entry 1 \(found 3\)"),
        ({"phrase": ..., "phrases": ["x", 3]}, r"key 'phrases' must be of type str.*\n.*\(found 3\)"),
        ({"phrase": ..., "phrases": []}, r"key 'phrases' is an empty list; leave the entry out, or complete it"),
        ({"phrase": ..., "phrases": "x"}, r"key 'phrases' must be of type list"),
        ({"box": ..., "bbox": [1, 2, 3, 4]}, rf"{EITHER} 'box' and 'boxes'.*\n.*'bbox'"),
        ({"box": [1, 2, 3]}, rf"key 'box' {BOX}.*\n.*\(found \[1, 2, 3\]\)"),
        ({"box": [[1, 2, 3, 4]]}, rf"key 'box' {BOX}"),
        ({"box": [1, 2, 3, 0]}, rf"key 'box' {BOX}"),
        ({"box": [1, 2, -3, 4]}, rf"key 'box' {BOX}"),
        ({"box": [1, 2, 3, 4, 0.9]}, rf"key 'box' {BOX}"),
        ({"box": ..., "boxes": [1, 2, 3, 4]}, r"key 'boxes' must be a list of boxes, each four numbers \[x, y, width"),
        ({"split": ""}, r"key 'split' must not be empty, nor 'epoch'"),
        ({"split": "epoch"}, r"key 'split' must not be empty, nor 'epoch'"),
        ({"split": 1}, r"key 'split' must be of type str"),
        ({"category": ["x"]}, r"key 'category' must be of type str"),
    ],
)
def test_an_entry_that_cannot_be_used(root: Path, change: dict[str, Any], message: str) -> None:
    """`...` leaves a key out."""
    entry = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    with pytest.raises(DataError, match=message):
        load(root, json.dumps([GOOD, entry]))


def test_all_problems_are_told_at_once(root: Path) -> None:
    rows = [json.dumps(GOOD), "{", '{"image": "a", "image": "b"}', "3", json.dumps({**GOOD, "image": "c.png"})]
    with pytest.raises(DataError) as refused:
        load(root, "\n".join(rows))
    kinds = str(refused.value)
    for message in (
        r"the line is not valid JSON; write one entry {...} a line, or a JSON list of entries - 1 found:",
        r"own0.json: line 2",
        r"own0.json: line 3",
        r"an entry must be an object {key: value} - 1 found:",
        r"own0.json: line 4 (found a int)",
        r"own0.json: line 5",
    ):
        assert message in kinds
    assert len(load(root, json.dumps([{**GOOD, "image": "c.png"}]), skip_missing=True)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"own0\.json: not valid JSON"),
        ("[]", r"own0\.json: holds no entries"),
        ('"x"', r"own0\.json: expected a JSON list, found a str"),
        ("[{]", r"own0\.json: not valid JSON"),
    ],
)
def test_a_file_that_cannot_be_used(root: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(root, text)


def test_a_missing_file() -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read \(No such file.*; check test_file"):
        OWN.load(GroundingConfig(test_file=["nowhere.json"], image_root=""))
