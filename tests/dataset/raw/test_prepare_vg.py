"""`prepare.py vg`: from small raw files in the owners' layouts, with every odd case, to whole outputs by hand."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

import prepare
from config import PretrainConfig
from dataset.raw import vg_phrases, visual_genome
from dataset.raw.vg_phrases import Rules
from dataset.raw.visual_genome import OUTPUTS
from dataset.reading import DataError
from dataset.vg import load_entries

OWNERS = "https://cs.stanford.edu/people/rak248"

IMAGES: list[dict[str, Any]] = [
    {"image_id": 7, "url": f"{OWNERS}/VG_100K_2/7.jpg", "width": 100, "height": 80, "coco_id": None, "flickr_id": "55"},
    {"id": "2", "url": f"{OWNERS}/VG_100K/2.jpg", "width": 200, "height": 100, "coco_id": 42, "flickr_id": None},
    {"image_id": 30, "url": f"{OWNERS}/VG_100K/30.jpg", "width": 50, "height": 50},
]


def region(phrase: str | None, x: float, y: float, width: float, height: float, **more: Any) -> dict[str, Any]:
    return {"region_id": 1, "phrase": phrase, "x": x, "y": y, "width": width, "height": height, **more}


REGIONS: list[dict[str, Any]] = [
    {
        "id": 7,
        "regions": [
            region("The Dog.", 10, 10, 30, 20, image_id=7),
            region("a red door", 50, 50, 10, 10, image_id=7),
            region(" the  dog\n", -5, -5, 20, 20, image_id="7"),  # the same phrase; the box sticks out
            region("the dog!", 10, 10, 30, 20),  # the same box again
            region(" ?! ", 1, 1, 5, 5),
            region("", 1, 1, 5, 5),
            region(None, 1, 1, 5, 5),
            region("outside", 100, 3, 5, 5),
            region("flat", 10, 10, 0, 5),
            region("of another image", 1, 1, 5, 5, image_id=2),
            {"phrase": "le café, là-bas", "x": 1.9, "y": 2.2, "w": 3.9, "h": 5},
            region("everything", -9, -9, 900, 900),
        ],
    },
    {"image_id": "2", "regions": [region("A sign", 20, 30, 40, 50)]},
    {"id": 99, "regions": [region("in an image that image_data lacks", 1, 1, 5, 5)]},
    {"id": 30, "regions": []},
]


def thing(names: Any, attributes: Any, x: float, y: float, w: float = 10, h: float = 10, **more: Any) -> dict[str, Any]:
    return {"names": names, "attributes": attributes, "x": x, "y": y, "w": w, "h": h, "synsets": [], **more}


ATTRIBUTES: list[dict[str, Any]] = [
    {
        "image_id": 7,
        "attributes": [
            thing(["car"], ["red", "Red ", "", None, "shiny"], 0, 35, object_id=1),
            thing(["Car", "vehicle", "car"], ["red"], 40, 35, object_id="2"),
            thing(["car"], ["red"], 80, 35, object_id=3),
            {"object_id": 4, "name": "tree", "attributes": "tall", "x": 50, "y": 0, "width": 20, "height": 30},
            thing([], ["lost"], 1, 1, object_id=5),
            {"object_id": 6, "names": ["wheel"], "x": 5, "y": 40, "w": 3, "h": 3},  # no key attributes
            thing(["wheel"], None, 45, 40, 3, 3),
            thing(["car"], ["flat"], 10, 10, 0, 10, object_id=8),
            thing(["hand"], ["left"], 10, 60, object_id=9),
            thing(["hand"], ["raised"], 60, 60, object_id=10),
        ],
    },
    {"image_id": 99, "attributes": [thing(["ghost"], ["pale"], 1, 1)]},
    {"image_id": 30},
    {"image_id": "2", "attributes": [thing(["cup"], ["white"], 10, 20), thing(["cup"], ["white"], 30, 70)]},
]

DESCRIPTIONS_FILE = r"""[
{"image": "VG_100K/2.jpg", "caption": "A sign", "bbox": [[20, 30, 60, 80]]},
{"image": "VG_100K_2/7.jpg", "caption": "The Dog.", "bbox": [[10, 10, 40, 30], [0, 0, 15, 15]]},
{"image": "VG_100K_2/7.jpg", "caption": "a red door", "bbox": [[50, 50, 60, 60]]},
{"image": "VG_100K_2/7.jpg", "caption": "le caf\u00e9, l\u00e0-bas", "bbox": [[1, 2, 5, 7]]},
{"image": "VG_100K_2/7.jpg", "caption": "everything", "bbox": [[0, 0, 100, 80]]}
]
"""
ATTRIBUTES_FILE = """[
{"image": "VG_100K/2.jpg", "caption": "white cup", "bbox": [[10, 20, 20, 30], [30, 70, 40, 80]]},
{"image": "VG_100K_2/7.jpg", "caption": "red car", "bbox": [[0, 35, 10, 45], [40, 35, 50, 45], [80, 35, 90, 45]]},
{"image": "VG_100K_2/7.jpg", "caption": "shiny car", "bbox": [[0, 35, 10, 45]]},
{"image": "VG_100K_2/7.jpg", "caption": "red vehicle", "bbox": [[40, 35, 50, 45]]},
{"image": "VG_100K_2/7.jpg", "caption": "tall tree", "bbox": [[50, 0, 70, 30]]},
{"image": "VG_100K_2/7.jpg", "caption": "left hand", "bbox": [[10, 60, 20, 70]]},
{"image": "VG_100K_2/7.jpg", "caption": "raised hand", "bbox": [[60, 60, 70, 70]]}
]
"""
SPATIAL_FILE = """[
{"image": "VG_100K/2.jpg", "caption": "left white cup", "bbox": [[10, 20, 20, 30]]},
{"image": "VG_100K/2.jpg", "caption": "top white cup", "bbox": [[10, 20, 20, 30]]},
{"image": "VG_100K/2.jpg", "caption": "right white cup", "bbox": [[30, 70, 40, 80]]},
{"image": "VG_100K/2.jpg", "caption": "bottom white cup", "bbox": [[30, 70, 40, 80]]},
{"image": "VG_100K_2/7.jpg", "caption": "left red car", "bbox": [[0, 35, 10, 45]]},
{"image": "VG_100K_2/7.jpg", "caption": "left shiny car", "bbox": [[0, 35, 10, 45]]},
{"image": "VG_100K_2/7.jpg", "caption": "middle red Car", "bbox": [[40, 35, 50, 45]]},
{"image": "VG_100K_2/7.jpg", "caption": "right red car", "bbox": [[80, 35, 90, 45]]},
{"image": "VG_100K_2/7.jpg", "caption": "right raised hand", "bbox": [[60, 60, 70, 70]]}
]
"""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with the three files above, in no order of image ids."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, value in (("image_data", IMAGES), ("region_descriptions", REGIONS), ("attributes", ATTRIBUTES)):
        write(folder / f"{name}.json", value)
    return folder


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def run(raw: Path, out: Path, *words: str | Path) -> None:
    args = prepare.parse_args(["vg", str(raw), "--out", str(out), *map(str, words)])
    args.run(args)


def outputs(folder: Path) -> list[str]:
    return [(folder / name).read_text(encoding="utf-8") for name in OUTPUTS.values()]


# ---- whole outputs


def test_the_three_files(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "out")
    descriptions, attributes, spatial = outputs(tmp_path / "out")
    assert descriptions == DESCRIPTIONS_FILE
    assert attributes == ATTRIBUTES_FILE
    assert spatial == SPATIAL_FILE
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(OUTPUTS.values())


def test_training_reads_every_entry(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path)
    files = [str(tmp_path / name) for name in OUTPUTS.values()]
    config = PretrainConfig(train_file=files, image_root="vg")
    assert [len(load_entries(file, config)) for file in files] == [5, 7, 9]
    assert load_entries(files[0], config)[0][:3] == (Path("vg/VG_100K/2.jpg"), ["a sign"], [[20, 30, 60, 80]])


def test_the_counts(raw: Path, tmp_path: Path) -> None:
    report = visual_genome.prepare([raw], tmp_path, Rules())
    drafts = report.drafts.values()
    assert [(len(d.places), d.entries, d.boxes) for d in drafts] == [(2, 5, 6), (2, 7, 10), (2, 9, 9)]
    descriptions, attributes, spatial = (+draft.dropped for draft in drafts)
    assert descriptions == {
        vg_phrases.NO_TEXT: 3,
        vg_phrases.EMPTY_BOX: 2,
        vg_phrases.OTHER_IMAGE: 1,
        vg_phrases.REPEATED: 1,
    }
    common = {vg_phrases.NO_NAME: 1, vg_phrases.NO_ATTRIBUTE: 2, vg_phrases.EMPTY_BOX: 1}
    assert attributes == common
    assert spatial == {**common, vg_phrases.ALONE: 2, vg_phrases.SAYS_WHERE: 1}
    assert (set(report.images.used), report.images.unknown) == ({7, 2, 30}, {99})
    total = sum(len(entry["regions"]) for entry in REGIONS if entry.get("id") != 99)
    assert report.drafts["descriptions"].boxes + descriptions.total() == total


def test_the_order_of_the_images_does_not_matter(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "one")
    for name, value in (("image_data", IMAGES), ("region_descriptions", REGIONS), ("attributes", ATTRIBUTES)):
        write(raw / f"{name}.json", value[1:] + value[:1])
    run(raw, tmp_path / "two")
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


def test_zipped(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "one")
    for path in list(raw.iterdir()):
        with zipfile.ZipFile(raw / f"{path.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/" + path.name, "rubbish")
            archive.writestr("some/folder/" + path.name, path.read_text())
        path.unlink()
    run(raw, tmp_path / "two")
    visual_genome.prepare(list(raw.iterdir()), tmp_path / "three", Rules())
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two") == outputs(tmp_path / "three")


def test_one_zip_of_everything(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "visual_genome.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in raw.iterdir():
            archive.write(file, file.name)
        archive.writestr("readme.txt", "")
    run(path, tmp_path / "out")
    assert outputs(tmp_path / "out") == [DESCRIPTIONS_FILE, ATTRIBUTES_FILE, SPATIAL_FILE]


def test_only_some_of_the_files(raw: Path, tmp_path: Path) -> None:
    (raw / "attributes.json").unlink()
    run(raw, tmp_path / "one", "--only", "descriptions")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["vg_descriptions.json"]
    assert (tmp_path / "one" / "vg_descriptions.json").read_text() == DESCRIPTIONS_FILE
    write(raw / "attributes.json", ATTRIBUTES)
    (raw / "region_descriptions.json").unlink()
    run(raw, tmp_path / "two", "--only", "attributes_spatial")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["vg_attributes_spatial.json"]
    assert (tmp_path / "two" / "vg_attributes_spatial.json").read_text() == SPATIAL_FILE
    run(raw, tmp_path / "three", "--only", "attributes")
    assert (tmp_path / "three" / "vg_attributes.json").read_text() == ATTRIBUTES_FILE


def test_objects_count_as_others_of_their_name(raw: Path, tmp_path: Path) -> None:
    """A fourth car, and a second tree, stand in objects.json alone; the other rows are what attributes.json has."""
    objects = [
        {"image_id": 30, "objects": []},
        {
            "image_id": 7,
            "objects": [
                thing(["car"], None, 0, 36, object_id=1),  # known already: its box here does not count
                {"object_id": 77, "names": ["CAR"], "x": 20, "y": 35, "w": 10, "h": 10},
                {"object_id": 78, "name": "tree", "x": 0, "y": 0, "w": 20, "h": 30},
                {"object_id": 79, "names": ["tree"], "x": 0, "y": 0, "w": 0, "h": 0},
            ],
        },
    ]
    write(raw / "objects.json", objects)
    run(raw, tmp_path)
    descriptions, attributes, spatial = outputs(tmp_path)
    assert (descriptions, attributes) == (DESCRIPTIONS_FILE, ATTRIBUTES_FILE)
    middle = '{"image": "VG_100K_2/7.jpg", "caption": "middle red Car", "bbox": [[40, 35, 50, 45]]},\n'
    tree = '{"image": "VG_100K_2/7.jpg", "caption": "right tall tree", "bbox": [[50, 0, 70, 30]]},\n'
    hand = '{"image": "VG_100K_2/7.jpg", "caption": "right raised hand"'
    assert spatial == SPATIAL_FILE.replace(middle, "").replace(hand, tree + hand)


# ---- images left out


def test_evaluation_images_are_left_out(raw: Path, tmp_path: Path) -> None:
    refs = tmp_path / "refs(unc).p"
    rows = [
        {"ref_id": i, "ann_id": i, "image_id": i, "split": "testB", "file_name": f"COCO_train2014_{7:012d}_1.jpg"}
        for i in (42, 55, 30)
    ]
    refs.write_bytes(pickle.dumps(rows))
    ids = write(tmp_path / "test.txt", "42\n7\n")  # a COCO id and an image id: no photos of Flickr
    run(raw, tmp_path / "out", "--exclude-eval", refs, ids)
    descriptions, attributes, spatial = outputs(tmp_path / "out")
    for found, whole in ((descriptions, DESCRIPTIONS_FILE), (attributes, ATTRIBUTES_FILE), (spatial, SPATIAL_FILE)):
        assert json.loads(found) == [row for row in json.loads(whole) if row["image"] != "VG_100K/2.jpg"]
    report = visual_genome.prepare([raw], tmp_path / "out", Rules(), exclude=[ids, refs])
    assert (report.images.evaluation, report.images.found) == ({2}, [0, 1])
    write(ids, "55")
    report = visual_genome.prepare([raw], tmp_path / "out", Rules(), exclude=[ids, refs])
    assert (report.images.evaluation, report.images.found) == ({2, 7}, [1, 1])
    assert set(report.images.used) == {30}
    assert report.images.unknown == {99}


def test_images_that_are_not_on_disk(raw: Path, tmp_path: Path) -> None:
    for name in ("VG_100K/2.jpg", "VG_100K/7.jpg", "VG_100K_2/30.jpg"):  # the last two are in the wrong folder
        (tmp_path / "vg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vg" / name).touch()
    run(raw, tmp_path / "out", "--image-root", tmp_path / "vg")
    for found, whole in zip(outputs(tmp_path / "out"), (DESCRIPTIONS_FILE, ATTRIBUTES_FILE, SPATIAL_FILE), strict=True):
        assert json.loads(found) == [row for row in json.loads(whole) if row["image"] == "VG_100K/2.jpg"]
    report = visual_genome.prepare([raw], tmp_path / "out", Rules(), image_root=tmp_path / "vg")
    assert (report.images.missing, report.images.unknown) == ({7, 30}, {99})
    split = [write(tmp_path / "test.txt", "55\n")]  # image 7, which is counted once
    report = visual_genome.prepare([raw], tmp_path / "out", Rules(), exclude=split, image_root=tmp_path / "vg")
    assert (set(report.images.used), report.images.evaluation, report.images.missing) == ({2}, {7}, {30})
    with pytest.raises(DataError, match=r"--image-root .*absent: no such folder"):
        run(raw, tmp_path / "out", "--image-root", tmp_path / "absent")


# ---- the program


def test_every_rule_is_an_option() -> None:
    words = "--group exact --min-area 0.1 --max-area 0.9 --max-boxes 5 --min-words 2 --max-words 7 --positions left top"
    words += " --margin 0.2 --spatial-form {phrase},{position}"
    args = prepare.parse_args(["vg", "raw", "--out", "out", *words.split()])
    chosen = Rules("exact", 0.1, 0.9, 5, 2, 7, ("left", "top"), 0.2, "{phrase},{position}")
    assert [getattr(args, name) for name in Rules._fields] == [
        list(value) if isinstance(value, tuple) else value for value in chosen
    ]
    defaults = prepare.parse_args(["vg", "one", "two", "--out", "out"])
    assert defaults.raw == [Path("one"), Path("two")]
    assert Rules(*(getattr(defaults, name) for name in Rules._fields)) == Rules()


def test_options_reach_the_rules(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path, "--min-words", "3", "--positions", "bottom", "--spatial-form", "{phrase} at the {position}")
    descriptions, attributes, spatial = (json.loads(text) for text in outputs(tmp_path))
    assert [row["caption"] for row in descriptions] == ["a red door", "le café, là-bas"]
    assert attributes == []
    assert [row["caption"] for row in spatial] == ["white cup at the bottom"]


@pytest.mark.parametrize(
    "words",
    [
        ["--min-area", "1.5"],
        ["--max-boxes", "0"],
        ["--margin", "wide"],
        ["--positions", "near"],
        ["--group", "all"],
        ["--spatial-form", "{phrase}"],
        ["--only", "everything"],
    ],
)
def test_bad_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare.parse_args(["vg", "raw", "--out", "out", *words])
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--min-area", "0.5", "--max-area", "0.4"], ["--min-words", "3", "--max-words", "2"]]
)
def test_limits_that_leave_nothing(raw: Path, tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit, match="must not exceed"):
        run(raw, tmp_path / "out", *words)


TABLE = """\
images in image_data              3
left out: in a val or test split  1
  test.txt: of 2 images           1
  train.txt: of 0 images          0
  saiapr.json: of 1 images        0
left out: not in image_data       1
images used                       2

Without coco_id: 2 images of image_data; without flickr_id: 2; with neither, so that no file can tell them: 1.
train.txt: holds no val or test split, so it left out nothing.
saiapr.json: images that are not COCO's by name, as RefCLEF's: 1; Visual Genome has no ids of theirs, so none could be \
looked for.

                              descriptions  attributes  attributes_spatial
images                                   1           1                   0
entries                                  1           1                   0
boxes                                    1           2                   0
dropped, by rule:
  no position tells it apart             0           0                   2
warning: attributes_spatial holds no entries; training refuses such a file, so leave it out of train_file

wrote out/vg_descriptions.json, out/vg_attributes.json, out/vg_attributes_spatial.json
"""


def test_the_table(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("test.txt"), "55\n1000092795\n")
    write(Path("train.txt"), "1\n")
    write(Path("saiapr.json"), [{"image": "saiapr_tc-12/00/images/25.jpg", "split": "test"}])
    files = ["--exclude-eval", "test.txt", "train.txt", "saiapr.json"]
    run(Path("raw"), Path("out"), *files, "--margin", "0.6")
    assert capsys.readouterr().out == TABLE


def test_large_numbers_in_the_table() -> None:
    assert visual_genome.table([["a", 1234567], ["long", "b", 3]]) == "a     1,234,567\nlong          b  3"
