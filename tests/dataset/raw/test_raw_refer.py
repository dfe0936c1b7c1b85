"""REFER's own files -> lists of expressions, MAttNet's detections -> dets.json: whole outputs, and broken files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import prepare
from config import GroundingConfig
from dataset.reading import DataError
from grounding.benchmarks import REFCOCO_PLUS
from tests.dataset.raw.raw_layouts import contents, run, write, write_refer


def sentences(*texts: str) -> list[dict[str, Any]]:
    return [{"sent_id": i, "sent": text, "raw": text.upper(), "tokens": text.split()} for i, text in enumerate(texts)]


def ref(ref_id: int, image_id: int, split: str, *texts: str) -> dict[str, Any]:
    row = {"ref_id": ref_id, "ann_id": 10 * ref_id, "image_id": image_id, "category_id": 1, "split": split}
    return {**row, "file_name": f"COCO_train2014_000000000099_{ref_id}.jpg", "sentences": sentences(*texts)}


REFS = [
    ref(8, 581857, "testB", "caf\u00e9 sign", "blue", "caf\u00e9 sign", "caf\u00e9 sign", "Blue"),
    ref(2, 7, "train", "left man"),
    ref(5, 123456789012, "testA", "man", " ?! ", "woman", "..."),
    ref(6, 7, "val", "left man", "the left man"),
    ref(9, 581857, "testA", "blue"),
    ref(3, 7, "testC", ""),
]
INSTANCES = {
    "images": [
        {"id": 7, "width": 64, "height": 48, "file_name": "7.jpg"},
        {"id": 581857, "width": 64, "height": 48, "file_name": "lies.jpg"},
        {"id": 123456789012, "width": 64, "height": 48, "file_name": "00/images/12.jpg"},
    ],
    "annotations": [
        # outside its image and without an area: evaluation counts them, so they stay
        {"id": 80, "image_id": 581857, "bbox": [-3, 60.5, 100, 2], "category_id": 1, "segmentation": [], "area": 9.5},
        {"id": 30, "image_id": 7, "bbox": [1, 1, 0, 5], "category_id": 1, "segmentation": [], "area": 0},
        *({"id": 10 * i, "image_id": 7, "bbox": [1, 2, 3, 4], "category_id": 1, "area": 12} for i in (2, 5, 6, 9)),
    ],
    "categories": [{"id": 1, "name": "thing"}],
}
COCO = {7: "COCO_train2014_000000000007.jpg", 581857: "COCO_train2014_000000581857.jpg"}
COCO[123456789012] = "COCO_train2014_123456789012.jpg"


def entry(image: str, text: str, ref_id: int, split: str) -> dict[str, Any]:
    return {"image": image, "text": text, "ref_id": ref_id, "split": split}


TRAIN = [entry(COCO[7], "left man", 2, "train")]
VAL = [entry(COCO[7], "left man", 6, "val"), entry(COCO[7], "the left man", 6, "val")]
TEST = [
    entry(COCO[581857], "caf\u00e9 sign", 8, "testB"),
    entry(COCO[581857], "blue", 8, "testB"),
    entry(COCO[581857], "caf\u00e9 sign", 8, "testB"),
    entry(COCO[581857], "caf\u00e9 sign", 8, "testB"),
    entry(COCO[581857], "Blue", 8, "testB"),
    *(entry(COCO[123456789012], text, 5, "testA") for text in ("man", " ?! ", "woman", "...")),
    entry(COCO[581857], "blue", 9, "testA"),
    entry(COCO[7], "", 3, "testC"),
]
LISTS = {"train": TRAIN, "val": VAL, "test": TEST}
TABLE = """\
split  refs  sentences  repeated  empty  expressions
train     1          1         0      0            1
val       1          2         0      0            2
testA     2          5         0      2            5
testB     1          5         2      0            5
testC     1          1         0      1            1
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The same refs as RefCOCO+, RefCOCOg (UMD) and RefCLEF."""
    for dataset, split_by in (("refcoco+", "unc"), ("refcocog", "umd"), ("refclef", "unc")):
        write_refer(tmp_path / "refer" / dataset, split_by, REFS, INSTANCES)
    return tmp_path


def make(root: Path, dataset: str, *words: object) -> dict[str, Any]:
    """The parts that are written, read again."""
    run("refer", root / "refer", "--dataset", dataset, "--out", root / "out", *words)
    names = {f"{dataset}_{part}.json": part for part in ("train", "val", "test")}
    found = contents(root / "out")
    assert found.keys() == names.keys()
    return {part: json.loads(found[name]) for name, part in names.items()}


def refused(root: Path, message: str, dataset: str = "refclef", *words: object) -> None:
    """The command stops with the message, and writes nothing."""
    with pytest.raises(DataError, match=message):
        make(root, dataset, *words)
    assert not (root / "out").exists()


def test_lists_of_coco_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(root, "refcoco+") == LISTS
    assert list(json.loads(contents(root / "out")["refcoco+_val.json"])[0]) == ["image", "text", "ref_id", "split"]
    files = "refcoco+_train.json: 1, refcoco+_val.json: 2, refcoco+_test.json: 11"
    last = f"wrote the expressions of refcoco+, split by unc, to {root / 'out'} ({files})\n"
    assert capsys.readouterr().out == TABLE + last


def test_splits_that_a_data_set_should_not_have_are_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(root, "refcocog") == LISTS
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:-1]] == ["train", "val", "test", "testB", "testA", "testC"]
    assert printed[3].split()[1:] == ["0"] * 5
    assert printed[-1].startswith("wrote the expressions of refcocog, split by umd, to ")


def test_lists_of_saiapr_images(root: Path) -> None:
    """Named by instances.json. Annotation ids may be texts, as RefCLEF's are: "8756_2", say."""
    names = {COCO[7]: "7.jpg", COCO[581857]: "lies.jpg", COCO[123456789012]: "00/images/12.jpg"}
    expected = {part: [{**row, "image": names[row["image"]]} for row in rows] for part, rows in LISTS.items()}
    assert make(root, "refclef") == expected
    refs = [{**row, "ann_id": f"{row['ann_id']}_1"} for row in REFS]
    annotations = [{**row, "id": f"{row['id']}_1"} for row in INSTANCES["annotations"]]
    write_refer(root / "refer" / "refclef", "unc", refs, {**INSTANCES, "annotations": annotations})
    assert make(root, "refclef") == expected


@pytest.mark.parametrize("option", [[], ["--keep-repeated"], ["--no-keep-repeated"]], ids=["default", "kept", "once"])
def test_repeated_sentences(root: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    """All of them, as the published numbers count, unless once is asked for; the table counts them either way."""
    texts = [row["text"] for row in make(root, "refcoco+", *option)["test"]]
    sign, once = "caf\u00e9 sign", option == ["--no-keep-repeated"]
    assert texts == [sign, "blue", *([] if once else [sign, sign]), "Blue", "man", " ?! ", "woman", "...", "blue", ""]
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[:-1]}
    assert rows["testB"] == ["1", "5", "2", "0", "3" if once else "5"]


def test_images_are_looked_for_on_disk(root: Path) -> None:
    files = (
        "7.jpg",
        "00/7.jpg",
        "00/images/7.jpg",
        "00/segmented_images/lies.jpg",
        "01/images/lies.jpg",
        "00/12.jpg",
        "02/12.jpg",
        "._7.jpg",
        ".Trashes/12.jpg",
        "__MACOSX/12.jpg",
    )
    for name in files:
        (root / "saiapr" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "saiapr" / name).touch()
    found = make(root, "refclef", "--image-root", root / "saiapr")
    assert {row["image"] for row in found["train"] + found["val"]} == {"7.jpg"}
    assert [row["image"] for row in found["test"]][4:7] == ["01/images/lies.jpg", "00/12.jpg", "00/12.jpg"]


def test_coco_images_in_a_folder_below(root: Path) -> None:
    (root / "coco" / "train2014").mkdir(parents=True)
    for name in COCO.values():
        (root / "coco" / "train2014" / name).touch()
    found = make(root, "refcoco+", "--image-root", root / "coco")
    assert found["train"] == [{**TRAIN[0], "image": f"train2014/{COCO[7]}"}]
    (root / "coco" / "train2014" / COCO[7]).unlink()
    kind = "the ref's image is not under --image-root: check the folder; --skip-missing leaves such refs out"
    with pytest.raises(DataError, match=rf"^{kind} - 3 found:\n.*: ref 1 \(ref_id 2\) \(image_id 7, {COCO[7]}\)"):
        make(root, "refcoco+", "--image-root", root / "coco")


def refclef(root: Path, *image_ids: int) -> Path:
    """RefCLEF by berkeley, a ref an image: train, val and test in turn. Neither 404 nor the known ones are on disk."""
    refs = [ref(i, image, ("train", "val", "test")[i % 3], "sky", "sky") for i, image in enumerate(image_ids)]
    images = [{"id": image, "file_name": f"{image}.jpg", "width": 9, "height": 9} for image in image_ids]
    annotations = [{"id": row["ann_id"], "image_id": row["image_id"], "bbox": [0, 0, 5, 5]} for row in refs]
    write_refer(root / "clef" / "refclef", "berkeley", refs, {"images": images, "annotations": annotations})
    (root / "saiapr").mkdir()
    for image in set(image_ids) - {17975, 19575, 19579, 404}:
        (root / "saiapr" / f"{image}.jpg").touch()
    return root / "clef"


def test_images_that_are_known_to_be_missing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = refclef(root, 17975, 1, 19575, 404, 2, 3)
    words = ["refer", folder, "--dataset", "refclef", "--out", root / "out"]
    image_root = ["--image-root", root / "saiapr"]
    with pytest.raises(DataError) as caught:
        run(*words, *image_root)
    place = f"  {folder / 'refclef' / 'refs(berkeley).p'}: ref"
    lack, check = "REFER's archive of SAIAPR is known to lack it", "check the folder"
    kind = "the ref's image is not under --image-root: {}; --skip-missing leaves such refs out - {} found:"
    assert str(caught.value).splitlines() == [
        kind.format(lack, 2),
        f"{place} 0 (ref_id 0) (image_id 17975, 17975.jpg)",
        f"{place} 2 (ref_id 2) (image_id 19575, 19575.jpg)",
        kind.format(check, 1),
        f"{place} 3 (ref_id 3) (image_id 404, 404.jpg)",
    ]
    assert not (root / "out").exists()
    with pytest.raises(SystemExit, match="--skip-missing needs --image-root"):
        run(*words, "--skip-missing")
    run(*words)  # nothing is looked for
    assert " missing " not in capsys.readouterr().out
    run(*words, *image_root, "--skip-missing")
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "split  refs  sentences  repeated  empty  missing  expressions",
        "train     2          4         0      0        4            0",
        "val       2          4         2      0        0            4",
        "test      2          4         1      0        2            2",
        "left out, not under --image-root: 3 images (17975.jpg, 19575.jpg, 404.jpg)",
    ]
    found = {name: json.loads(text) for name, text in contents(root / "out").items()}
    assert {name: len(rows) for name, rows in found.items()} == {
        "refclef_train.json": 0,
        "refclef_val.json": 4,
        "refclef_test.json": 2,
    }
    assert {row["image"] for rows in found.values() for row in rows} == {"1.jpg", "2.jpg", "3.jpg"}


def test_many_missing_images_are_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = refclef(root, *range(1, 11))
    for image in range(2, 10):
        (root / "saiapr" / f"{image}.jpg").unlink()
    run("refer", folder, "--dataset", "refclef", "--out", root / "o", "--image-root", root / "saiapr", "--skip-missing")
    said = "left out, not under --image-root: 8 images (2.jpg, 3.jpg, 4.jpg, 5.jpg, 6.jpg and 3 more)"
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("dataset", "there", "used", "noted"),
    [
        ("refclef", ["unc", "berkeley"], "berkeley", False),
        ("refclef", ["unc"], "unc", True),
        ("refcocog", ["google", "umd"], "umd", False),
        ("refcocog", ["google"], "google", True),
        ("refcoco", ["google", "unc"], "unc", False),
    ],
)
def test_the_default_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, there: list[str], used: str, noted: bool
) -> None:
    """That of the published numbers; else the one that is there, and a note says so. A part may be empty."""
    for split_by in there:
        write_refer(tmp_path / "refer" / dataset, split_by, [REFS[1], REFS[3]], INSTANCES)
    assert [len(rows) for rows in make(tmp_path, dataset).values()] == [1, 2, 0]
    printed = capsys.readouterr().out
    assert f"wrote the expressions of {dataset}, split by {used}, to " in printed
    usual = {"refclef": "berkeley", "refcocog": "umd"}.get(dataset)
    said = f"note: refs({usual}).p is not there, of which the published numbers are; this is refs({used}).p\n"
    assert (said in printed) == noted
    make(tmp_path, dataset, "--split-by", used)
    assert "note" not in capsys.readouterr().out


def test_what_killed_commands_left_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw.json", [{"image_id": 1, "box": [1, 2, 3, 4]}])
    left = write(tmp_path / ".dets.json.7@elsewhere.tmp", "half")
    os.utime(left, (0, 0))  # nobody has written to it for a day
    prepare.main(prepare.parse_args(["detections", str(tmp_path / "raw.json"), "--out", str(tmp_path / "dets.json")]))
    assert contents(tmp_path).keys() == {"raw.json", "dets.json"}
    assert f"{left}: removed, 0.0 MB that a killed process left" in capsys.readouterr().out


def test_evaluation_reads_the_lists(root: Path) -> None:
    make(root, "refcocog")
    (root / "images").mkdir()
    for name in COCO.values():
        (root / "images" / name).touch()
    (root / "dets.json").write_text(json.dumps({image_id: [] for image_id in COCO}))
    config = GroundingConfig(
        test_file=[str(root / "out" / f"refcocog_{part}.json") for part in ("val", "test")],
        image_root=str(root / "images"),
        refcoco_data=str(root / "refer"),
        det_file=str(root / "dets.json"),
        refer_dataset="refcocog",
        refer_split="umd",
    )
    expressions = REFCOCO_PLUS.load(config)
    found = [(one.text, one.ref_id, one.split) for one in expressions]
    empty = {" ?! ": "", "...": ""}
    texts = [empty.get(row["text"], row["text"].lower()) for row in VAL + TEST]
    rows = zip(texts, VAL + TEST, strict=True)
    assert found == [(text, row["ref_id"], row["split"]) for text, row in rows]
    assert expressions[2].boxes.tolist() == [[-3, 60.5, 100, 2]]


# ---- broken input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("refcocog --split-by unc", r"^refcocog is split by umd and by google, not by unc; .*--split-by of prepare"),
        ("refcoco", r"refs\(unc\)\.p: does not exist; refer must hold refcoco/ as .* refcoco\.zip"),
        ("refclef --split-by berkeley", r"\(berkeley\)\.p: does not exist; there is refs\(unc\)\.p, see --split-by"),
        ("refcoco+", r"refcoco\+/instances\.json: does not exist; refer must hold refcoco\+/"),
        ("refclef --image-root out2", r"^out2: is not a folder; --image-root must"),
        ("refclef --image-root refer/refclef", r"^refer/refclef: holds no \.jpg; --image-root must"),
    ],
)
def test_files_that_are_not_there(root: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    monkeypatch.chdir(root)
    Path("refer/refcoco+/instances.json").unlink()
    refused(Path(), message, *words.split())


def changed(rows: list[dict[str, Any]], index: int, **changes: Any) -> list[dict[str, Any]]:
    return [*rows[:index], {**rows[index], **changes}, *rows[index + 1 :]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "minival"}, r"is none of train, val and test.* - 1 found:\n.*ref 1 \(ref_id 2\) \('minival'\)"),
        ({"image_id": 8}, r"image is not in .*instances\.json; .* refs\(unc\)\.p - 1 found:\n.*\(image_id 8\)"),
        ({"ann_id": 21}, r"annotation is not in .*instances\.json.*\n.*\(ref_id 2\) \(ref_id 2, ann_id 21\)"),
        ({"sentences": None}, r"key 'sentences' must be of type list.*\n.*\(ref_id 2\)"),
        ({"sentences": ["left man"]}, r"an entry must be an object.*\n.*\(found a str\)"),
        ({"sentences": [{"raw": "left man"}]}, r"key 'sent' is missing"),
        ({"ref_id": 8}, r"an earlier entry has the same ref_id.*\n.*ref 1 \(ref_id 8\)"),
    ],
)
def test_broken_refs(root: Path, changes: dict[str, Any], message: str) -> None:
    write_refer(root / "refer" / "refclef", "unc", changed(REFS, 1, **changes), INSTANCES)
    refused(root, message)


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("images", {"file_name": None}, r"key 'file_name' must be of type str.* - 3 found:\n.*ref 1 \(ref_id 2\)"),
        ("annotations", {"bbox": [1, 2, 3]}, r"'bbox' of the ref's annotation must be .*\n.*ref 0 \(ref_id 8\)"),
        ("annotations", {"id": 30}, r"an earlier entry has the same id.*\n.*annotations entry 1 \(id 30\)"),
    ],
)
def test_broken_instances(root: Path, key: str, changes: dict[str, Any], message: str) -> None:
    instances = {**INSTANCES, key: changed(INSTANCES[key], 0, **changes)}
    write_refer(root / "refer" / "refclef", "unc", REFS, instances)
    refused(root, message)


# ---- detections


def detection(image_id: Any, box: Any) -> dict[str, Any]:
    return {"det_id": 1, "box": box, "image_id": image_id, "category_id": 1, "category_name": "cat", "score": 0.5}


DETECTIONS = [
    detection(12, [1, 2.5, 3, 4]),
    detection(7, [0, 0, 9, 9]),
    detection("12", [5, 5, 0, -1]),
    detection(100, [1.25, -2, 3, 4]),
    detection(12, [0, 0, 1, 1]),
]
GROUPED = '{"7": [[0, 0, 9, 9]], "12": [[1, 2.5, 3, 4], [5, 5, 0, -1], [0, 0, 1, 1]], "100": [[1.25, -2, 3, 4]]}\n'


def group(tmp_path: Path, rows: Any, *words: object) -> str:
    write(tmp_path / "raw.json", rows)
    run("detections", tmp_path / "raw.json", "--out", tmp_path / "out" / "dets.json", *words)
    return contents(tmp_path / "out")["dets.json"]


def test_detections_by_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert group(tmp_path, DETECTIONS) == GROUPED
    to = tmp_path / "out" / "dets.json"
    assert capsys.readouterr().out == f"wrote 5 detections in 3 images, 0 of them without any, to {to}\n"


def test_images_without_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instances = tmp_path / "instances.json"
    write(instances, {"images": [{"id": 7}, {"id": 9}], "annotations": []})
    assert group(tmp_path, DETECTIONS, "--instances", instances) == GROUPED.replace('"12"', '"9": [], "12"')
    assert "5 detections in 4 images, 1 of them without any" in capsys.readouterr().out
    write(instances, {"images": [{"id": 7}, {"id": "9"}], "annotations": []})
    with pytest.raises(DataError, match=r"'id' must be of type int.*\n.*images entry 1 \(found '9'\)"):
        group(tmp_path, DETECTIONS, "--instances", instances)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*DETECTIONS, "x"], r"an entry must be an object.*\n.*raw\.json: entry 5 \(found a str\)"),
        ([{"image_id": 1}], r"key 'box' is missing - 1 found:\n.*entry 0"),
        ([detection(1, [1, 2, 3])], r"key 'box' must be four finite numbers .*\n.*entry 0 \(found \[1, 2, 3\]\)"),
        ([detection(1, [1, 2, 3, 4, 0.5])], r"four finite numbers"),
        ([detection(1, [1, 2, 3, float("nan")])], r"four finite numbers"),
        ([detection(1, [1, 2, 3, True])], r"four finite numbers"),
        ([detection("a1", [1, 2, 3, 4])], r"'image_id' must be of type int.*\n.*entry 0 \(found 'a1'\)"),
        ([detection("9" * 5000, [1, 2, 3, 4])], r"'image_id' must be of type int.*\n.*entry 0 \(found '9+[.]{3}9+'"),
        ([detection(1.5, [1, 2, 3, 4])] * 2, r"'image_id' must be of type int - 2 found"),
        ([], r"raw\.json: holds no detections"),
        ({"7": [[1, 2, 3, 4]]}, r"raw\.json: expected a JSON list, found a dict"),
    ],
)
def test_broken_detections(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        group(tmp_path, rows)
    with pytest.raises(DataError, match=r"no\.json: does not exist; check the path"):
        group(tmp_path, rows, "--instances", tmp_path / "no.json")
    assert not (tmp_path / "out").exists()
