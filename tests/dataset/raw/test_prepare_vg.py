"""`prepare.py vg`: from small raw files in the owners' layouts, with every odd case, to whole outputs by hand."""

import json
import pickle
import zipfile
from collections.abc import Callable
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
from tests.dataset.raw.raw_layouts import contents, run, write

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


WHOLE = dict(zip(OUTPUTS.values(), (DESCRIPTIONS_FILE, ATTRIBUTES_FILE, SPATIAL_FILE), strict=True))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with the three files above, in no order of image ids."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, value in (("image_data", IMAGES), ("region_descriptions", REGIONS), ("attributes", ATTRIBUTES)):
        write(folder / f"{name}.json", value)
    return folder


def entries(files: dict[str, str], without: str = "") -> dict[str, list[dict[str, Any]]]:
    """What the files hold, but for an image's entries."""
    return {name: [row for row in json.loads(text) if row["image"] != without] for name, text in files.items()}


# ---- whole outputs


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], list[Path]]:
    def rewrite(raw: Path) -> list[Path]:
        for path in raw.iterdir():
            path.write_bytes(change(path.read_bytes()))
        return [raw]

    return rewrite


def zipped(raw: Path) -> list[Path]:
    """An archive a file, as macOS makes them."""
    for path in list(raw.iterdir()):
        with zipfile.ZipFile(raw / f"{path.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/" + path.name, "rubbish")
            archive.writestr("some/folder/" + path.name, b"\xef\xbb\xbf" + path.read_bytes())
        path.unlink()
    return [raw]


def in_one_zip(raw: Path) -> list[Path]:
    """An archive of another name, with what version control and editors put beside files."""
    archive = zipfile.ZipFile(raw / "vg.zip", "w")
    with archive:
        archive.writestr("vg/readme.txt", "")
        for path in raw.glob("*.json"):
            archive.write(path, f"vg/{path.name}")
            for folder in ("vg/__MACOSX", ".Trash-0", "vg/.git"):
                archive.writestr(f"{folder}/{path.name}", b"\x00\x05\x16\x07")
    return [raw / "vg.zip"]


def beside_hidden_files(raw: Path) -> list[Path]:
    for name in ("._image_data.json", ".image_data.json.swp", ".DS_Store", "._image_data.json.zip"):
        (raw / name).write_bytes(b"\x00\x05\x16\x07")
    return [raw]


LAYOUTS: dict[str, Callable[[Path], list[Path]]] = {
    "folder": lambda raw: [raw],
    "files": lambda raw: list(raw.iterdir()),
    "zipped": zipped,
    "zips": lambda raw: list(zipped(raw)[0].iterdir()),
    "one zip": in_one_zip,
    "hidden files": beside_hidden_files,
    "byte-order mark": rewritten(lambda data: b"\xef\xbb\xbf" + data),
    "mark and CRLF": rewritten(lambda data: b"\xef\xbb\xbf\r\n" + data.replace(b', "', b',\r\n"')),
    "indented": rewritten(lambda data: json.dumps(json.loads(data), indent=4, ensure_ascii=False).encode()),
    "other order": rewritten(lambda data: json.dumps(json.loads(data)[1:] + json.loads(data)[:1]).encode()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_three_files(raw: Path, tmp_path: Path, layout: str) -> None:
    run("vg", *LAYOUTS[layout](raw), "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == WHOLE


def test_training_reads_every_entry(raw: Path, tmp_path: Path) -> None:
    run("vg", raw, "--out", tmp_path)
    files = [str(tmp_path / name) for name in OUTPUTS.values()]
    config = PretrainConfig(train_file=files, image_root="vg")
    assert [len(load_entries(file, config)) for file in files] == [5, 7, 9]
    assert load_entries(files[0], config)[0][:3] == (Path("vg/VG_100K/2.jpg"), ["a sign"], [[20, 30, 60, 80]])


def test_the_counts(raw: Path, tmp_path: Path) -> None:
    images, drafts = visual_genome.prepare([raw], tmp_path, Rules())
    found = [(len(draft.places), draft.entries, draft.boxes) for draft in drafts.values()]
    assert found == [(2, 5, 6), (2, 7, 10), (2, 9, 9)]
    descriptions, attributes, spatial = (+draft.dropped for draft in drafts.values())
    assert descriptions == {
        vg_phrases.NO_TEXT: 3,
        vg_phrases.EMPTY_BOX: 2,
        vg_phrases.OTHER_IMAGE: 1,
        vg_phrases.REPEATED: 1,
    }
    common = {vg_phrases.NO_NAME: 1, vg_phrases.NO_ATTRIBUTE: 2, vg_phrases.EMPTY_BOX: 1}
    assert attributes == common
    assert spatial == {**common, vg_phrases.ALONE: 2, vg_phrases.SAYS_WHERE: 1}
    assert (set(images.used), images.unknown) == ({7, 2, 30}, {99})
    total = sum(len(entry["regions"]) for entry in REGIONS if entry.get("id") != 99)
    assert drafts["descriptions"].boxes + descriptions.total() == total


@pytest.mark.parametrize(
    ("name", "needless"),
    [
        ("descriptions", "attributes"),
        ("attributes", "region_descriptions"),
        ("attributes_spatial", "region_descriptions"),
    ],
)
def test_one_of_the_files(raw: Path, tmp_path: Path, name: str, needless: str) -> None:
    (raw / f"{needless}.json").unlink()
    run("vg", raw, "--out", tmp_path / "out", "--only", name)
    assert contents(tmp_path / "out") == {OUTPUTS[name]: WHOLE[OUTPUTS[name]]}


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
    run("vg", raw, "--out", tmp_path / "out")
    middle = '{"image": "VG_100K_2/7.jpg", "caption": "middle red Car", "bbox": [[40, 35, 50, 45]]},\n'
    tree = '{"image": "VG_100K_2/7.jpg", "caption": "right tall tree", "bbox": [[50, 0, 70, 30]]},\n'
    hand = '{"image": "VG_100K_2/7.jpg", "caption": "right raised hand"'
    spatial = SPATIAL_FILE.replace(middle, "").replace(hand, tree + hand)
    assert contents(tmp_path / "out") == {**WHOLE, "vg_attributes_spatial.json": spatial}


# ---- images left out


def test_evaluation_images_are_left_out(raw: Path, tmp_path: Path) -> None:
    refs = tmp_path / "refs(unc).p"
    coco = f"COCO_train2014_{7:012d}_1.jpg"
    rows = [{"ref_id": i, "ann_id": i, "image_id": i, "split": "testB", "file_name": coco} for i in (42, 55, 30)]
    refs.write_bytes(pickle.dumps(rows))
    ids = write(tmp_path / "test.txt", "42\n7\n")  # a COCO id and an image id: no photos of Flickr
    run("vg", raw, "--out", tmp_path / "out", "--exclude-eval", refs, ids)
    assert entries(contents(tmp_path / "out")) == entries(WHOLE, without="VG_100K/2.jpg")
    write(ids, "55")
    images, _ = visual_genome.prepare([raw], tmp_path / "out", Rules(), exclude=[ids, refs])
    assert [held for _, held in images.evaluation] == [{7}, {2}]
    assert (set(images.used), images.unknown) == ({30}, {99})


def test_images_that_are_not_on_disk(raw: Path, tmp_path: Path) -> None:
    for name in ("VG_100K/2.jpg", "VG_100K/7.jpg", "VG_100K_2/30.jpg"):  # the last two are in the wrong folder
        (tmp_path / "vg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vg" / name).touch()
    run("vg", raw, "--out", tmp_path / "out", "--image-root", tmp_path / "vg")
    assert entries(contents(tmp_path / "out")) == entries(WHOLE, without="VG_100K_2/7.jpg")
    split = [write(tmp_path / "test.txt", "55\n")]  # image 7, which is counted once
    images, _ = visual_genome.prepare([raw], tmp_path / "out", Rules(), exclude=split, image_root=tmp_path / "vg")
    assert (set(images.used), images.evaluation[0][1], images.missing) == ({2}, {7}, {30})
    with pytest.raises(DataError, match=r"--image-root .*absent: no such folder"):
        run("vg", raw, "--out", tmp_path / "out", "--image-root", tmp_path / "absent")


# ---- the program


def test_every_rule_is_an_option() -> None:
    words = "--group exact --min-area 0.1 --max-area 0.9 --max-boxes 5 --min-words 2 --max-words 7 --positions left top"
    words += " --margin 0.2 --spatial-form {phrase},{position}"
    args = prepare.parse_args(["vg", "raw", "--out", "out", *words.split()])
    chosen = ["exact", 0.1, 0.9, 5, 2, 7, ["left", "top"], 0.2, "{phrase},{position}"]
    assert [getattr(args, name) for name in Rules._fields] == chosen
    defaults = prepare.parse_args(["vg", "one", "two", "--out", "out"])
    assert defaults.raw == [Path("one"), Path("two")]
    assert Rules(*(getattr(defaults, name) for name in Rules._fields)) == Rules()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--min-area 1.5", "--min-area: must be from 0 to 1, not 1.5"),
        ("--max-boxes 0", "--max-boxes: must be at least 1, not 0"),
        ("--spatial-form {phrase}", "--spatial-form: must hold {position} and {phrase}, not '{phrase}'"),
        ("--min-area 0.5 --max-area 0.4", "--min-area must not exceed --max-area"),
        ("--min-words 3 --max-words 2", "nor --min-words --max-words"),
    ],
)
def test_bad_arguments_are_refused(
    raw: Path, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("vg", raw, "--out", tmp_path / "out", *words.split())
    assert message in capsys.readouterr().err + str(stopped.value)


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
    run("vg", "raw", "--out", "out", *files, "--margin", "0.6")
    assert capsys.readouterr().out == TABLE


def test_large_numbers_in_the_table() -> None:
    assert visual_genome.table([["a", 1234567], ["long", "b", 3]]) == "a     1,234,567\nlong          b  3"
