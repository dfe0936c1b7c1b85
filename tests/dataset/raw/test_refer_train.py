"""`prepare.py refer-train`: REFER's train split as training entries, without the images of evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from config import PretrainConfig
from dataset.reading import DataError
from dataset.vg import TrainingData
from tests.dataset.raw.raw_layouts import run, write_refer
from tests.dataset.raw.test_raw_refer import ref

SQUARE = [[1, 1, 4, 1, 4, 3, 1, 3]]
RLE = {"size": [48, 64], "counts": [0, 2, 3070]}
REFS = [
    ref(1, 10, "train", "the red man", "man", "the red man", "?!"),
    ref(2, 10, "train", "a dog"),
    ref(3, 11, "train", "of val, too"),
    ref(4, 11, "val", "a cat"),
    ref(5, 12, "train", "..."),
    ref(6, 13, "train", "of another set"),
    ref(7, 14, "testA", "a bird"),
]
NAMES = {key: f"COCO_train2014_{key:012d}.jpg" for key in range(10, 15)}


def instances(**segmentations: Any) -> dict[str, Any]:
    rows = [{"id": 10 * k, "image_id": 10, "bbox": [1, 1, 3, 2.5], "segmentation": SQUARE} for k in range(1, 8)]
    for key, value in segmentations.items():
        rows[int(key[1:]) - 1]["segmentation"] = value
    images = [{"id": k, "width": 64, "height": 48, "file_name": f"{k}.jpg"} for k in NAMES]
    return {"images": images, "annotations": rows, "categories": []}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """RefCOCO+, RefCLEF with the same ids, and RefCOCO, whose val has the image 13."""
    for dataset in ("refcoco+", "refclef"):
        named = [row if dataset == "refcoco+" else {**row, "file_name": "1_1.jpg"} for row in REFS]
        write_refer(tmp_path / "refer" / dataset, "unc", named, instances(_2=[RLE] if dataset == "refclef" else RLE))
    write_refer(tmp_path / "refer" / "refcoco", "unc", [ref(1, 13, "val", "a"), ref(2, 10, "train", "b")], instances())
    berkeley = [{**ref(1, 13, "test", "a"), "file_name": "1_1.jpg"}]
    write_refer(tmp_path / "refer" / "refclef", "berkeley", berkeley, instances(_2=[RLE]))
    return tmp_path


def made(root: Path, dataset: str, *words: object) -> list[dict[str, Any]]:
    options = "--dataset", dataset, "--split-by", "unc", "--out", root / "out" / "train.json"
    run("refer-train", root / "refer", *options, *words)
    return json.loads((root / "out" / "train.json").read_text())


def test_entries_with_boxes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = root / "refer" / "refcoco" / "refs(unc).p"
    box = [[1, 1, 4, 3.5]]
    first = [
        {"image": NAMES[10], "caption": ["the red man", "man"], "bbox": box},
        {"image": NAMES[10], "caption": ["a dog"], "bbox": box},
    ]
    assert made(root, "refcoco+") == [*first, {"image": NAMES[13], "caption": ["of another set"], "bbox": box}]
    capsys.readouterr()
    assert made(root, "refcoco+", "--exclude-eval", other) == first
    assert capsys.readouterr().out == (
        f"refs: 5\nleft out, in val or test of {root / 'refer' / 'refcoco+' / 'refs(unc).p'}: 1\n"
        f"left out, of {other}: 1\nleft out, without a text: 1\nentries: 2\n"
        f"wrote the train split of refcoco+, split by unc, with boxes to {root / 'out' / 'train.json'}\n"
    )


@pytest.mark.parametrize("dataset", ["refcoco+", "refclef"])
def test_entries_with_masks_are_read_by_training(dataset: str, root: Path) -> None:
    other = {"refcoco+": "refcoco/refs(unc).p", "refclef": "refclef/refs(berkeley).p"}[dataset]
    rows = made(root, dataset, "--masks", "--exclude-eval", root / "refer" / other)
    assert [row["segmentation"] for row in rows] == [[SQUARE], [RLE if dataset == "refcoco+" else [RLE]]]
    assert all(row.keys() == {"image", "caption", "segmentation"} for row in rows)
    Image.new("RGB", (64, 48)).save(root / rows[0]["image"])
    keys = {"image_res": 48, "mask_size": 48, "augment": {"flip_prob": 0}}
    data = TrainingData(PretrainConfig(train_file=[str(root / "out/train.json")], image_root=str(root), **keys), seed=0)
    assert [int(data[k].mask.sum()) for k in (0, 1)] == [4, 2]  # two of three columns are sampled


@pytest.mark.parametrize(
    ("dataset", "other", "collection"), [("refcoco+", "refclef", "COCO"), ("refclef", "refcoco", "SAIAPR")]
)
def test_splits_of_other_images_are_refused(root: Path, dataset: str, other: str, collection: str) -> None:
    """They could leave out nothing."""
    with pytest.raises(DataError, match=rf"{other}/refs\(unc\)\.p: has no val or test images of {collection}"):
        made(root, dataset, "--exclude-eval", root / "refer" / other / "refs(unc).p")
    assert not (root / "out").exists()


def test_what_cannot_be_used(root: Path) -> None:
    folder = root / "refer" / "refcoco+"
    write_refer(folder, "unc", REFS, instances(_1=[[1, 1, 4]], _2=[], _6=[[90, 1, 95, 1, 95, 5]], _3=None))
    with pytest.raises(DataError) as refused:
        made(root, "refcoco+", "--masks")
    lines = str(refused.value).splitlines()
    where = f"{folder / 'instances.json'}: 'segmentation' of the ref's annotation"
    assert [line.removeprefix(where) for line in lines[::2]] == [
        ": a polygon must be finite numbers [x1, y1, x2, y2, ...], of 3 points or more - 1 found:",
        " must be a list of polygons, or an RLE {size, counts} - 1 found:",
        " covers no pixel of the image - 1 found:",
    ]
    assert [line.partition(": ref_id ")[2][0] for line in lines[1::2]] == ["1", "2", "6"]
    write_refer(folder, "unc", REFS[2:5], instances())
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: no ref of the train split is left"):
        made(root, "refcoco+")


def test_the_name_of_an_image_is_that_of_the_lists(root: Path) -> None:
    (root / "images" / "train2014").mkdir(parents=True)
    for name in NAMES.values():
        (root / "images" / "train2014" / name).touch()
    rows = made(root, "refcoco+", "--image-root", root / "images")
    assert {row["image"] for row in rows} == {f"train2014/{NAMES[key]}" for key in (10, 13)}


def test_refs_without_an_image_or_a_sentence_are_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_refer(root / "refer" / "refcoco+", "unc", [*REFS, {**REFS[0], "ref_id": 8, "sentences": []}], instances())
    (root / "images").mkdir()
    (root / "images" / NAMES[10]).touch()
    assert len(made(root, "refcoco+", "--image-root", root / "images", "--skip-missing")) == 2
    said = capsys.readouterr().out
    assert said.startswith("refs: 6\n")
    assert said.splitlines()[2:5] == [
        "left out, not under --image-root: 2",
        "left out, without a text: 1",
        "entries: 2",
    ]
