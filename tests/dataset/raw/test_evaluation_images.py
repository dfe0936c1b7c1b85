"""Which images --exclude-eval finds in the files of the benchmarks' splits."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from dataset.raw.evaluation_images import read_evaluation_images
from dataset.reading import DataError
from tests.dataset.raw.raw_layouts import write


def coco(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def refs(path: Path, *rows: tuple[int, Any, str, str]) -> Path:
    """A file of refs: image id, annotation id, split and file name of each."""
    keys = ("image_id", "ann_id", "split", "file_name")
    path.write_bytes(pickle.dumps([{"ref_id": i, **dict(zip(keys, row, strict=True))} for i, row in enumerate(rows)]))
    return path


def test_images_of_refs(tmp_path: Path) -> None:
    """The id is image_id: the number in file_name lies."""
    splits = ("train", "val", "testA", "testB", "testC", "test")
    rows = [(i, i, split, coco(900 + i)) for i, split in enumerate(splits)]
    found = read_evaluation_images(refs(tmp_path / "refs(unc).p", *rows))
    assert (found.coco, found.flickr, found.unknown) == ({1, 2, 3, 4, 5}, set(), 0)


def test_images_of_refclef_are_not_cocos(tmp_path: Path) -> None:
    """Its annotation ids are texts."""
    rows = [(42, "42_1", "val", "42_1.jpg"), (43, "43_2", "testA", "43_2.jpg"), (44, "44_1", "train", "4.jpg")]
    found = read_evaluation_images(refs(tmp_path / "refs(unc).p", *rows))
    assert (found.coco, found.flickr, found.unknown) == (set(), set(), 2)


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


@pytest.mark.parametrize(
    ("name", "ids"),
    [("test", {55, 1000092795}), ("train", set()), ("trainval", {55, 1000092795}), ("train_test", {55, 1000092795})],
)
def test_images_of_flickr30k(tmp_path: Path, name: str, ids: set[int]) -> None:
    found = read_evaluation_images(write(tmp_path / f"{name}.txt", "55\n1000092795\n\n"))
    assert (found.coco, found.flickr, found.unknown) == (set(), ids, 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("test.txt", "12\nabc\n", r"test\.txt: 'abc' is no id of a Flickr photo"),
        ("test.json", '[{"image": "a"}, {"text": "b"}]', r"key 'image' is missing - 1 found:\n.*test\.json: entry 1"),
        ("test.json", '[{"image": "a", "split": 3}]', r"key 'split' must be of type str.*\n.*entry 0 \(found 3\)"),
        ("test.json", "{}", "expected a JSON list"),
        ("test.json", '[{"image": "a", "image": "b"}]', r"test\.json: an object holds the key 'image' more than once"),
        ("test.txt", "12\n13\n12\n", r"image id is listed more than once.*\n.*test\.txt: image 12 \(2 times\)"),
        ("refs(unc).p", "no pickle", "not a readable pickle"),
        ("test.csv", "", r"test\.csv: expected REFER's refs"),
        (None, "", r"absent\.txt: does not exist; --exclude-eval takes"),
    ],
)
def test_evaluation_files_that_cannot_be_used(tmp_path: Path, name: str | None, text: str, message: str) -> None:
    path = write(tmp_path / name, text) if name else tmp_path / "absent.txt"
    with pytest.raises(DataError, match=message):
        read_evaluation_images(path)
