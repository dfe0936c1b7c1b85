"""Visual Genome's regions of a held-out list: order, boxes, splits, and what each broken file says."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import prepare
from config import GroundingConfig
from dataset.expressions import Expression, Reading
from dataset.raw.check import check
from dataset.reading import DataError
from grounding.benchmarks import BENCHMARKS, benchmark_of

Row = dict[str, Any]


def region(phrase: str | None, *box: float, **more: Any) -> Row:
    return {"region_id": 1, "phrase": phrase, **dict(zip(("x", "y", "width", "height"), box, strict=True)), **more}


IMAGES: list[Row] = [
    {"image_id": i, "url": f"https://cs.stanford.edu/people/rak248/{folder}/{i}.jpg", "width": 60, "height": 40}
    for i, folder in ((7, "VG_100K_2"), (30, "VG_100K"), (5, "VG_100K"), (8, "VG_100K"))
]
REGIONS: list[Row] = [
    {"id": 5, "regions": [region("not asked for", 0, 0, 9, 9)]},
    {"id": 30, "regions": [region("The cup", 1, 2, 30, 20, image_id=30), region("the cup", 3, 4, 5.5, 6)]},
    {"image_id": "7", "regions": [region("A dog!", -3, 4, 80, 6), region("it", 1, 1, 2, 2, image_id=99)]},
    {"id": 8, "regions": []},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "image_data", IMAGES)
    write(tmp_path, "region_descriptions", REGIONS)
    (tmp_path / "test.txt").write_text("30\n7\n")
    for row in IMAGES:
        path = tmp_path.joinpath(*row["url"].split("/")[-2:])
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40)).save(path)
    return tmp_path


def write(root: Path, name: str, value: Any) -> None:
    (root / f"{name}.json").write_text(json.dumps(value))


def config_of(root: Path, *lists: str) -> GroundingConfig:
    files = {"image_data_file": str(root / "image_data.json"), "region_file": str(root / "region_descriptions.json")}
    ids = [str(root / name) for name in lists or ("test.txt",)]
    return GroundingConfig(benchmark="vg", image_root=str(root), image_ids_file=ids, **files)


def load(root: Path, *lists: str) -> list[Expression]:
    return BENCHMARKS["vg"].load(config_of(root, *lists))


def test_every_region_in_the_order_of_the_lists(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "my_val.txt").write_text("8 7")
    found = load(root, "test.txt", "my_val.txt")
    assert [(one.ref_id, one.text, one.split) for one in found] == [
        (0, "the cup", "test"),
        (1, "the cup", "test"),
        (2, "a dog", "test"),
        (3, "a dog", "val"),
    ]
    assert [one.boxes.tolist() for one in found[:3]] == [[[1, 2, 30, 20]], [[3, 4, 5.5, 6]], [[-3, 4, 80, 6]]]
    assert [one.image for one in found[1:3]] == [root / "VG_100K" / "30.jpg", root / "VG_100K_2" / "7.jpg"]
    assert found[3].record == {"image_path": "VG_100K_2/7.jpg", "split": "val"}
    assert found[0].size == (40, 60)
    printed = capsys.readouterr().out
    assert "it is left out - 1 found:" in printed
    assert "entry 2, region 1 (image 99, in the entry of 7)" in printed


def damaged(rows: list[Row], change: Callable[[list[Row]], Any]) -> list[Row]:
    copy = json.loads(json.dumps(rows))
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("region_descriptions", lambda rows: rows.pop(1), r"no entry in .*region_descr.*\n.*test\.txt: image 30"),
        ("region_descriptions", lambda rows: rows.append(rows[1]), r"has an entry already; .*\n.*entry 4 \(image 30\)"),
        ("region_descriptions", lambda rows: rows[1].pop("regions"), r"key 'regions' is missing.*\n.*entry 1"),
        ("region_descriptions", lambda rows: rows.append(3), r"must be an object .*\n.*entry 4 \(found a int"),
        ("region_descriptions", lambda rows: rows[1].pop("id"), r"'image_id' or 'id' is missing.*\n.*entry 1"),
        (
            "region_descriptions",
            lambda rows: rows[1]["regions"].append([]),
            r"must be an object .*\n.*1, region 2 \(fou",
        ),
        ("region_descriptions", lambda rows: rows[1]["regions"][1].pop("x"), r"key 'x' must be .*\n.*1, region 1"),
        ("region_descriptions", lambda rows: rows[1]["regions"][0].update(phrase=4), r"'phrase' must be of type str"),
        ("region_descriptions", lambda rows: rows[1]["regions"][0].update(width=float("nan")), "must be a number"),
        ("image_data", lambda rows: rows.pop(0), r"the image id has no entry in .*image_data.*\n.*test\.txt: image 7"),
        ("image_data", lambda rows: rows[0].update(url="http://x/7.jpg"), r"key 'url' must end in .*\n.*entry 0 \("),
        ("image_data", lambda rows: rows[0].update(height=0), "'width' and 'height' must be positive"),
    ],
)
def test_what_is_said_of_broken_entries(root: Path, name: str, change: Callable[..., Any], message: str) -> None:
    rows = {"image_data": IMAGES, "region_descriptions": REGIONS}[name]
    write(root, name, damaged(rows, change))
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30 VG_100K/7.jpg", r"must hold Visual Genome's image ids, one a line .*\n.*'VG_100K/7\.jpg'"),
        ("30 30", "the image id is listed more than once"),
        ("30 31", r"no entry in .*image_data\.json, or none that can be used - 1 found:\n.*test\.txt: image 31"),
        ("", "lists no image ids"),
        ("31", r"no entry in .*image_data\.json, or none that can be used - 1 found:\n.*test\.txt: image 31"),
        ("8", r"region_descriptions\.json: holds no region of the listed images; do the files match"),
    ],
)
def test_lists_that_cannot_be_used(root: Path, text: str, message: str) -> None:
    (root / "test.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load(root)


def test_missing_files_and_keys(root: Path) -> None:
    with pytest.raises(ValueError, match="lacks 'region_file', which this benchmark needs"):
        BENCHMARKS["vg"].load(config_of(root).model_copy(update={"region_file": None}))
    (root / "VG_100K_2" / "7.jpg").unlink()
    with pytest.raises(DataError, match=r"the image file does not exist; .*\n.*entry 2, region 0 \(.*7\.jpg\)"):
        load(root)
    (root / "image_data.json").unlink()
    with pytest.raises(DataError, match=r"image_data\.json: cannot be read"):
        load(root)


def test_check_goes_on_and_does_not_blame_the_list_for_a_broken_file(root: Path) -> None:
    (root / "image_data.json").write_text("[")
    reading = Reading(goes_on=True)
    assert BENCHMARKS["vg"].read(config_of(root), reading) == []
    assert [(bool(file.failures), file.problems.kinds) for file in reading.files] == [
        (False, {}),
        (True, {}),
        (False, {}),
    ]


def test_check_compares_the_stated_size_with_the_image(root: Path) -> None:
    """Maps are resized to it: turned, each would be of another shape than its image."""
    write(root, "image_data", [{**row, "width": 40, "height": 60} for row in IMAGES])
    (root / "vg.yaml").write_text(json.dumps(config_of(root).model_dump(mode="json", exclude_unset=True)))
    text = check([str(root / "vg.yaml")], [], sample=0, workers=1, shown=1, find=benchmark_of).text()
    assert "the annotated size is not that of the image file - 2 found:" in text
    assert "region_descriptions.json: entry 1 (annotated 40x60, " in text


def test_held_out_images_are_not_trained_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The list of the evaluation leaves its images out of the training files."""
    words = ["vg", *map(str, root.glob("*.json")), "--out", str(root), "--only", "descriptions", "--hold-out"]
    args = prepare.parse_args([*words, str(root / "test.txt")])
    args.run(args)
    assert [row["caption"] for row in json.loads((root / "vg_descriptions.json").read_text())] == ["not asked for"]
    printed = capsys.readouterr().out
    assert re.search(r"test\.txt: of 2 images +2\n", printed)
    assert "coco_id" not in printed
    (root / "test.txt").write_text("30\n7.jpg\n")
    with pytest.raises(DataError, match=r"must hold Visual Genome's image ids.*\n.*'7\.jpg'"):
        args.run(args)
    (root / "test.txt").write_text("2407890\n2407891\n")
    with pytest.raises(
        DataError, match=r"test\.txt: .*image_data\.json has none of its 2 ids; are they Visual Genome's"
    ):
        args.run(args)
    (root / "test.txt").unlink()
    with pytest.raises(DataError, match=r"test\.txt: does not exist; --hold-out takes"):
        args.run(args)
