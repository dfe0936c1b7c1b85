"""Which images --exclude-eval finds in the files of the benchmarks' splits."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from dataset.raw.evaluation_images import read_evaluation_images
from dataset.reading import DataError


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def ref(image_id: int, split: str, name: str) -> dict[str, Any]:
    return {"ref_id": image_id, "ann_id": image_id, "image_id": image_id, "split": split, "file_name": name}


def coco(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def test_images_of_refs(tmp_path: Path) -> None:
    """The id is image_id: the number in file_name lies."""
    splits = ("train", "val", "testA", "testB", "testC", "test")
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([ref(i, split, coco(900 + i)) for i, split in enumerate(splits)]))
    found = read_evaluation_images(path)
    assert (found.coco, found.flickr, found.unknown) == ({1, 2, 3, 4, 5}, set(), 0)


def test_images_of_refclef_are_not_cocos(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(
        pickle.dumps([ref(42, "val", "42_1.jpg"), ref(43, "testA", "43_2.jpg"), ref(44, "train", "4.jpg")])
    )
    found = read_evaluation_images(path)
    assert (found.coco, found.flickr, found.unknown) == (set(), set(), 2)
    path.write_bytes(pickle.dumps([{**ref(42, "val", "42.jpg"), "ann_id": "42_1"}]))  # as they are in the real files
    assert read_evaluation_images(path).unknown == 1


def test_images_of_expressions(tmp_path: Path) -> None:
    rows = [
        {"image": f"train2014/{coco(42)}", "split": "testA"},
        {"image": coco(43), "split": "train"},
        {"image": f"train2014/{coco(44)}", "split": "val"},
        {"image": "saiapr_tc-12/00/images/25.jpg", "split": "val"},
    ]
    found = read_evaluation_images(write(tmp_path / "train.json", rows))
    assert (found.coco, found.unknown) == ({42, 44}, 1)
    bare = [{"image": row["image"]} for row in rows]
    found = read_evaluation_images(write(tmp_path / "test.json", bare))
    assert (found.coco, found.unknown) == ({42, 43, 44}, 1)
    assert len(read_evaluation_images(write(tmp_path / "train.json", bare))) == 0


def test_images_of_flickr30k(tmp_path: Path) -> None:
    found = read_evaluation_images(write(tmp_path / "test.txt", "55\n1000092795\n\n"))
    assert (found.coco, found.flickr, found.unknown) == (set(), {55, 1000092795}, 0)
    assert len(read_evaluation_images(write(tmp_path / "train.txt", "55\n"))) == 0
    assert len(read_evaluation_images(write(tmp_path / "trainval.txt", "55\n"))) == 1
    assert len(read_evaluation_images(write(tmp_path / "train_test.txt", "55\n"))) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("test.txt", "12\nabc\n", r"test\.txt: 'abc' is no id of a Flickr photo"),
        ("test.json", '[{"image": "a"}, {"text": "b"}]', r"test\.json: entry 1: key 'image' is missing"),
        ("test.json", '[{"image": "a", "split": 3}]', r"test\.json: entry 0: key 'split' must be of type str found 3"),
        ("test.json", "{}", "expected a JSON list"),
        ("test.json", '[{"image": "a", "image": "b"}]', r"test\.json: an object holds the key 'image' more than once"),
        ("test.txt", "12\n13\n12\n", r"image id is listed more than once.*\n.*test\.txt: image 12 \(2 times\)"),
        ("refs(unc).p", "no pickle", "not a readable pickle"),
        ("test.csv", "", r"test\.csv: expected REFER's refs"),
        (None, "", r"absent\.txt: no such file"),
    ],
)
def test_evaluation_files_that_cannot_be_used(tmp_path: Path, name: str | None, text: str, message: str) -> None:
    path = write(tmp_path / name, text) if name else tmp_path / "absent.txt"
    with pytest.raises(DataError, match=message):
        read_evaluation_images(path)
