"""`prepare.py check`: scenes as generated pass; every kind of damage to them is named by file and entry, in one run."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

import prepare
from config import GroundingConfig
from dataset.raw import check_images
from dataset.raw.check import is_refclef
from dataset.raw.check_images import Seen, evenly, look, note_images
from dataset.raw.check_report import Report

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(f"configs/scenes/{path.name}" for path in (ROOT / "configs" / "scenes").glob("*.yaml"))
TRAIN, EVALUATION = 8, 4  # scenes
S = "data/scenes"
PHRASES, CAPTIONS = f"{S}/train_phrases.json", f"{S}/train_captions.json"
REFCOCO, REFCLEF, FLICKR = f"{S}/refer/refcoco+", f"{S}/refer/refclef", f"{S}/flickr"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set. Do not write into it."""
    out = tmp_path_factory.mktemp("scenes") / "scenes"
    counts = ["--train", str(TRAIN), "--annotated", str(TRAIN), "--eval", str(EVALUATION), "--size", "48"]
    args = prepare.parse_args(["scenes", str(out), *counts])
    args.run(args)
    return out


@pytest.fixture
def place(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the shipped configs and a data/scenes of its own."""
    shutil.copytree(scenes, tmp_path / S)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Outcome(NamedTuple):
    status: int
    out: str


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `prepare.py check` and return its exit status and what it prints."""

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        args = prepare.parse_args(["check", *words])
        status = 0
        try:
            args.run(args)
        except SystemExit as end:
            status = int(end.code or 0)
        return Outcome(status, capsys.readouterr().out)

    return run


def load(path: str) -> Any:
    return json.loads(Path(path).read_text())


def edit(path: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    content = load(path)
    change(content)
    Path(path).write_text(json.dumps(content))


def named_first(file: str, image: str) -> str:
    """The first entry of a file that names an image, as it is named in messages."""
    index = next(i for i, row in enumerate(load(file)) if row["image"] == image)
    return f"{file}: entry {index}"


# ---- what is as it should be


def test_scenes_as_generated_are_fine(place: Path, check: Callable[..., Outcome]) -> None:
    status, out = check(*CONFIGS)
    assert status == 0
    assert out.splitlines()[-1] == "no errors and no warnings in 27 files"
    lines = [line.split() for line in out.split("\n\n")[0].splitlines()]
    assert lines[0] == ["file", "checked", "count", "errors", "warnings"]
    assert all(line[-2:] == ["-", "-"] for line in lines[1:])
    counts = {line[0]: line[-3] for line in lines[1:]}
    assert len(counts) == 27
    assert counts[CAPTIONS] == str(len(load(CAPTIONS))) == str(TRAIN)
    assert counts[PHRASES] == str(len(load(PHRASES)))
    assert counts[f"{S}/images"] == str(TRAIN + 3 * EVALUATION)
    assert counts[f"{FLICKR}/test.txt"] == counts[f"{FLICKR}/bounding_boxes_test.json"] == str(2 * EVALUATION)
    manifest = load(f"{S}/scenes.json")["counts"]
    assert counts[f"{REFCLEF}/refs(unc).p"] == str(manifest["refclef"])
    assert counts[f"{FLICKR}/sentences_val.json"] == str(manifest["flickr val"])
    assert counts[f"{S}/matching_val.json"] == str(manifest["matching_val.json"])
    assert counts[f"{REFCOCO}/refcoco+_val.json"] == str(len(load(f"{REFCOCO}/refcoco+_val.json")))


def test_splits_of_other_sizes_are_noted(place: Path, check: Callable[..., Outcome]) -> None:
    out = check("configs/scenes/Grounding_refcoco.yaml", "configs/scenes/Grounding_flickr.yaml").out
    config = "  configs/scenes/Grounding_refcoco.yaml: RefCOCO+"
    expressions = len(load(f"{REFCOCO}/refcoco+_val.json"))
    assert f"{config} val: {expressions} expressions; published: 10,758\n{config} testA: " in out
    assert "expressions; published: 5,726\n" in out
    assert "expressions; published: 4,889\n" in out
    config = "  configs/scenes/Grounding_flickr.yaml: Flickr30k"
    assert f"{config} val: 4 images; published: 1,000\n{config} test: 8 images; published: 1,000\n" in out


def test_splits_of_the_published_size_are_not(
    place: Path, check: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataset.raw.check.PUBLISHED", {"flickr": {"val": 4, "test": 8}})
    assert "notes" not in check(*CONFIGS).out


def test_shipped_configs_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[..., Outcome]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    status, out = check("configs/Pretrain.yaml", "configs/Grounding_refcoco.yaml")
    assert status == 1
    missing = "cannot be read (No such file or directory); check"
    assert out.split("\n\n")[1].splitlines() == [
        "errors",
        f"  data/vg_descriptions.json: {missing} the path in the config [train_file of configs/Pretrain.yaml]",
        f"  data/vg_attributes_spatial.json: {missing} the path in the config [train_file of configs/Pretrain.yaml]",
        f"  data/vg_attributes.json: {missing} the path in the config [train_file of configs/Pretrain.yaml]",
        *(
            f"  data/{file}: {missing} {what} in the config [{key} of configs/Grounding_refcoco.yaml]"
            for file, what, key in (
                ("refer/refcoco+/refs(unc).p", "refcoco_data", "refcoco_data"),
                ("refer/refcoco+/instances.json", "the path", "refcoco_data"),
                ("refcoco+/dets.json", "the path", "det_file"),
                ("refcoco+/refcoco+_val.json", "the path", "test_file"),
                ("refcoco+/refcoco+_test.json", "the path", "test_file"),
            )
        ),
        "  data/vg/: no such folder [image_root of configs/Pretrain.yaml]",
        "  data/coco/train2014: no such folder [image_root of configs/Grounding_refcoco.yaml]",
    ]
    last = "10 errors and no warnings in 13 files; docs/data.md says where each file comes from and what it must hold"
    assert out.splitlines()[-1] == last


# ---- damage: each function does some, and returns how it must be reported


class Problem(NamedTuple):
    level: str
    file: str
    kind: str  # its beginning
    first: list[str] = []  # noqa: RUF012 - never changed


def write_cut(path: str) -> None:
    """Lose the second half of a file."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def broken_json() -> Problem:
    write_cut(f"{S}/matching_val.json")
    return Problem("error", f"{S}/matching_val.json", f"{S}/matching_val.json: not valid JSON (")


def missing_file() -> Problem:
    Path(CAPTIONS).unlink()
    return Problem("error", CAPTIONS, f"{CAPTIONS}: cannot be read (No such file or directory); check the path")


def unreadable_pickle() -> Problem:
    path = f"{REFCLEF}/refs(unc).p"
    write_cut(path)
    return Problem("error", path, f"{path}: not a readable pickle (")


def missing_key() -> Problem:
    edit(PHRASES, lambda rows: rows[0].pop("caption"))
    return Problem("error", PHRASES, "key 'caption' is missing", [f"{PHRASES}: entry 0 (000000.jpg)"])


def wrong_type() -> Problem:
    file = f"{REFCOCO}/refcoco+_val.json"
    edit(file, lambda rows: rows[0].update(ref_id="7"))
    return Problem("error", file, "key 'ref_id' must be of type int", [f"{file}: entry 0 (found '7')"])


def wrong_type_of_box() -> Problem:
    edit(PHRASES, lambda rows: rows[1].update(bbox=[1, 2, 3, 4]))
    where = f"{PHRASES}: entry 1 (000000.jpg) (found [1, 2, 3, 4])"
    return Problem("error", PHRASES, "key 'bbox' must be a list of [x1, y1, x2, y2]", [where])


def empty_text() -> Problem:
    file = f"{REFCLEF}/refclef_val.json"
    edit(file, lambda rows: rows[1].update(text="?!"))
    return Problem("error", file, "the expression is empty once cleaned", [f"{file}: entry 1 ('?!')"])


def missing_split() -> Problem:
    file = f"{REFCLEF}/refclef_val.json"
    edit(file, lambda rows: rows[2].pop("split"))
    return Problem("error", file, "key 'split' is missing", [f"{file}: entry 2"])


def sentence_without_phrases() -> Problem:
    file = f"{FLICKR}/sentences_val.json"
    edit(file, lambda sentences: sentences["100002"][1].pop("phrases"))
    return Problem("error", file, "key 'phrases' is missing", [f"{file}: image 100002, sentence 1"])


def neither_true_nor_false() -> Problem:
    file = f"{S}/matching_testB.json"
    edit(file, lambda rows: rows[3].update(match=2))
    return Problem("error", file, "key 'match' must be 0 or 1", [f"{file}: entry 3 (found 2)"])


def missing_image() -> Problem:
    Path(f"{S}/images/000001.jpg").unlink()
    where = f"{entry_of('000001.jpg')} ({S}/images/000001.jpg)"
    return Problem("error", f"{S}/images", "the image file does not exist; check image_root", [where])


def entry_of(image: str) -> str:
    """The first training phrase of an image, as it is named in messages."""
    index = next(i for i, row in enumerate(load(PHRASES)) if row["image"] == image)
    return f"{PHRASES}: entry {index} ({image})"


def wrong_extension() -> Problem:
    Path(f"{S}/images/000002.jpg").rename(f"{S}/images/000002.jpeg")
    where = f"{entry_of('000002.jpg')} ({S}/images/000002.jpg; there is 000002.jpeg)"
    return Problem("error", f"{S}/images", "the image file does not exist, but one of another extension does", [where])


def truncated_image() -> Problem:
    path = f"{S}/images/000003.jpg"
    write_cut(path)
    where = f"{entry_of('000003.jpg')} ({path}: image file is truncated"
    return Problem("error", f"{S}/images", "the image cannot be decoded; is the download complete?", [where])


def other_content() -> Problem:
    path = f"{S}/images/000004.jpg"
    Image.open(path).save(path, format="PNG")
    where = f"{entry_of('000004.jpg')} ({path}: PNG)"
    return Problem("warning", f"{S}/images", "the image's content is of another format than its name says", [where])


def size_of(image: str) -> str:
    width, height = Image.open(f"{S}/images/{image}").size
    return f"{width}x{height}"


def training_box_outside() -> Problem:
    index = next(i for i, row in enumerate(load(PHRASES)) if row["image"] == "000005.jpg")
    edit(PHRASES, lambda rows: rows[index].update(bbox=[[200, 10, 210, 20]]))
    where = f"{entry_of('000005.jpg')} ([200, 10, 210, 20] in {size_of('000005.jpg')})"
    return Problem("warning", PHRASES, "no box covers a pixel of the image: amc.empty_box says", [where])


def training_boxes_partly_outside() -> Problem:
    """Three of five boxes: by a pixel and no more, one may be."""
    width, height = Image.open(f"{S}/images/000006.jpg").size
    boxes = [[0, 0, 9, 9], [-1, -1, width + 1, height + 1], [0, 0, width + 1.5, 9], [-3, 0, 9, 9], [9, 0, 9, 9]]
    index = next(i for i, row in enumerate(load(PHRASES)) if row["image"] == "000006.jpg")
    edit(PHRASES, lambda rows: rows[index].update(bbox=boxes))
    shown = [f"[0, 0, {width + 1.5:g}, 9]", "[-3, 0, 9, 9]", "[9, 0, 9, 9]"]
    where = [f"{entry_of('000006.jpg')} ({box} in {width}x{height})" for box in shown]
    return Problem("warning", PHRASES, "a box reaches out of its image, or covers no pixel of it", where)


REFCOCO_TEST = f"{REFCOCO}/refcoco+_test.json"


def unknown_ref() -> Problem:
    edit(REFCOCO_TEST, lambda rows: rows[-1].update(ref_id=999))
    kind = f"ref_id is not in {REFCOCO}/refs(unc).p; check that refcoco_data"
    return Problem("error", REFCOCO_TEST, kind, [f"{REFCOCO_TEST}: entry {len(load(REFCOCO_TEST)) - 1} (ref_id 999)"])


def entries_of_image(image: str) -> list[str]:
    return [f"{REFCOCO_TEST}: entry {i}" for i, row in enumerate(load(REFCOCO_TEST)) if row["image"] == image]


def missing_detections() -> Problem:
    edit(f"{REFCOCO}/dets.json", lambda boxes: boxes.pop("200001"))
    where = [f"{place} (image_id 200001)" for place in entries_of_image("200001.jpg")]
    return Problem("error", REFCOCO_TEST, f"the image has no detections in {REFCOCO}/dets.json", where)


def broken_detections() -> Problem:
    edit(f"{REFCOCO}/dets.json", lambda boxes: boxes.update({"200002": [[1, 2, 3]]}))
    where = [f"{place} (found [[1, 2, 3]])" for place in entries_of_image("200002.jpg")]
    return Problem("error", REFCOCO_TEST, f"{REFCOCO}/dets.json: the image's detections must be a list of boxes", where)


def annotation_outside() -> Problem:
    """The box of a ref, said once though the ref has several expressions."""
    ref_id = next(row["ref_id"] for row in load(REFCOCO_TEST) if row["image"] == "300000.jpg")
    refs = {ref["ref_id"]: ref for ref in pickle.loads(Path(f"{REFCOCO}/refs(unc).p").read_bytes())}
    ann_id = refs[ref_id]["ann_id"]
    edit(f"{REFCOCO}/instances.json", lambda tables: tables["annotations"][ann_id].update(bbox=[500, 3, 40, 6]))
    where = f"{entries_of_image('300000.jpg')[0]} ([500, 3, 540, 9] in {size_of('300000.jpg')})"
    return Problem("error", REFCOCO_TEST, "no box covers a pixel of the image: no answer can be right", [where])


def missing_annotation() -> Problem:
    ref_id = next(row["ref_id"] for row in load(REFCOCO_TEST) if row["image"] == "300001.jpg")
    refs = {ref["ref_id"]: ref for ref in pickle.loads(Path(f"{REFCOCO}/refs(unc).p").read_bytes())}
    ann_id = refs[ref_id]["ann_id"]
    edit(f"{REFCOCO}/instances.json", lambda tables: tables["annotations"][ann_id].update(id=10**6))
    of_ref = [i for i, row in enumerate(load(REFCOCO_TEST)) if row["ref_id"] == ref_id]
    where = [f"{REFCOCO_TEST}: entry {i} (ref_id {ref_id}, ann_id {ann_id})" for i in of_ref]
    return Problem("error", REFCOCO_TEST, f"the ref's annotation is not in {REFCOCO}/instances.json", where)


def image_row_without_id() -> Problem:
    file = f"{REFCLEF}/instances.json"
    edit(file, lambda tables: tables["images"][2].pop("id"))
    return Problem("error", file, "key 'id' is missing", [f"{file}: images entry 2"])


def phrase_without_box() -> Problem:
    boxes, sentences = f"{FLICKR}/bounding_boxes_test.json", f"{FLICKR}/sentences_test.json"
    phrase_id = next(iter(load(boxes)["200000"]["boxes"]))
    where = [
        f"{sentences}: image 200000, sentence {i}, phrase {j} (phrase_id {phrase_id})"
        for i, sentence in enumerate(load(sentences)["200000"])
        for j, phrase in enumerate(sentence["phrases"])
        if phrase["phrase_id"] == phrase_id
    ]
    edit(boxes, lambda rows: rows["200000"]["boxes"].pop(phrase_id))
    return Problem("warning", sentences, "the phrase's id has no boxes and is not under 'scene' or 'nobox'", where)


def phrase_box_outside() -> Problem:
    """All the boxes of a phrase id: the one is of another image, the other has its corners exchanged."""
    file = f"{FLICKR}/bounding_boxes_val.json"
    phrase_id = next(iter(load(file)["100000"]["boxes"]))
    edit(file, lambda rows: rows["100000"]["boxes"].update({phrase_id: [[300, 1, 310, 9], [9, 9, 1, 1]]}))
    where = f"{file}: image 100000, phrase id {phrase_id} ([300, 1, 310, 9], [9, 9, 1, 1] in {size_of('100000.jpg')})"
    return Problem("error", file, "no box covers a pixel of the image: no answer can be right", [where])


def other_size() -> Problem:
    file = f"{FLICKR}/bounding_boxes_val.json"
    edit(file, lambda rows: rows["100001"].update(width=500, height=400))
    found = f"annotated 500x400, {S}/images/100001.jpg has {size_of('100001.jpg')}"
    where = [f"{file}: image 100001 ({found})"]
    return Problem("warning", file, "the annotated size is not that of the image file", where)


def image_without_boxes_entry() -> Problem:
    file = f"{FLICKR}/bounding_boxes_test.json"
    edit(file, lambda rows: rows.pop("300002"))
    return Problem("error", file, "the image id has no entry; check that phrase_box_file", [f"{file}: image 300002"])


def repeated_id() -> Problem:
    file = f"{FLICKR}/val.txt"
    Path(file).write_text(Path(file).read_text() + "100003\n100003\n")
    return Problem("warning", file, "the image id is listed more than once", [f"{file}: image 100003"])


def repeated_training_entry() -> Problem:
    index = next(i for i, row in enumerate(load(PHRASES)) if row["image"] == "000007.jpg")
    edit(PHRASES, lambda rows: rows.append({**rows[index], "bbox": []}))
    where = f"{PHRASES}: entry {len(load(PHRASES)) - 1} (000007.jpg) (as entry {index} (000007.jpg))"
    return Problem("warning", PHRASES, "image and text are those of an earlier entry", [where])


def repeated_expression() -> Problem:
    file = f"{REFCOCO}/refcoco+_val.json"
    edit(file, lambda rows: rows.append({**rows[2], "text": rows[2]["text"].upper() + "."}))
    where = f"{file}: entry {len(load(file)) - 1} (as entry 2)"
    return Problem("warning", file, "image and text are those of an earlier entry", [where])


def repeated_pair() -> Problem:
    file = f"{S}/matching_testB.json"
    edit(file, lambda rows: rows.append(rows[1]))
    where = f"{file}: entry {len(load(file)) - 1} (as entry 1)"
    return Problem("warning", file, "image and text are those of an earlier entry", [where])


DAMAGE: list[Callable[[], Problem]] = [
    broken_json,
    missing_file,
    unreadable_pickle,
    missing_key,
    wrong_type,
    wrong_type_of_box,
    empty_text,
    missing_split,
    sentence_without_phrases,
    neither_true_nor_false,
    missing_image,
    wrong_extension,
    truncated_image,
    other_content,
    training_box_outside,
    training_boxes_partly_outside,
    unknown_ref,
    missing_detections,
    broken_detections,
    annotation_outside,
    missing_annotation,
    image_row_without_id,
    phrase_without_box,
    phrase_box_outside,
    other_size,
    image_without_boxes_entry,
    repeated_id,
    repeated_training_entry,
    repeated_expression,
    repeated_pair,
]


def assert_reported(problem: Problem, reported: list[dict[str, Any]]) -> None:
    (found,) = [
        row for row in reported if (row["level"], row["file"]) == problem[:2] and row["kind"].startswith(problem.kind)
    ]
    assert found["count"] == max(1, len(problem.first))
    assert len(found["first"]) == len(problem.first)
    for place, start in zip(found["first"], problem.first, strict=True):
        assert place.startswith(start)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_by_file_and_entry(
    damage: Callable[[], Problem], place: Path, check: Callable[..., Outcome]
) -> None:
    problem = damage()
    status, out = check(*CONFIGS, "--json", "--show", "50")
    content = json.loads(out)
    assert len(content["problems"]) == 1
    assert_reported(problem, content["problems"])
    cases = content["problems"][0]["count"]
    assert (content["errors"], content["warnings"]) == ((cases, 0) if problem.level == "error" else (0, cases))
    assert content["ok"] == (problem.level == "warning")
    assert status == int(problem.level == "error")
    of_rows = [(row["file"], row["errors"], row["warnings"]) for row in content["files"]]
    assert [row for row in of_rows if row[1:] != (0, 0)] == [(problem.file, content["errors"], content["warnings"])]


def test_all_damage_in_one_run(place: Path, check: Callable[..., Outcome]) -> None:
    problems = [damage() for damage in DAMAGE]
    status, out = check(*CONFIGS, "--json", "--show", "50")
    content = json.loads(out)
    assert status == 1
    for problem in problems:
        assert_reported(problem, content["problems"])
    assert len(content["problems"]) == len(problems)
    errors = sum(max(1, len(problem.first)) for problem in problems if problem.level == "error")
    assert (content["errors"], content["warnings"]) == (
        errors,
        sum(len(p.first) for p in problems if p.level != "error"),
    )


# ---- what is printed


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training config of three entries about two images of 20 x 10 pixels, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(f"images/{name}")
    rows = [{"image": image, "caption": "a dog", "bbox": [[0, 0, 5, 5]]} for image in ("a.png", "b.png")]
    Path("train.json").write_text(json.dumps([*rows, {**rows[1], "caption": ["a cat", "cat"], "bbox": []}]))
    bert = {"fusion_layer": 1, "encoder_width": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    Path("bert.json").write_text(json.dumps(bert))
    sizes = {"image_res": 8, "patch_size": 4, "vision_width": 8, "vision_heads": 2, "amc": {"layer": 1}}
    files = {"train_file": ["train.json"], "image_root": "images", "bert_config": "bert.json"}
    Path("some.yaml").write_text(json.dumps({**sizes, **files}))  # JSON is YAML
    return tmp_path


def test_the_table_when_all_is_fine(small: Path, check: Callable[..., Outcome]) -> None:
    assert check("some.yaml") == (
        0,
        "file        checked              count  errors  warnings\n"
        "some.yaml   training config          -       -         -\n"
        "bert.json   BERT config              -       -         -\n"
        "train.json  training entries         3       -         -\n"
        "images      images, all decoded      2       -         -\n"
        "\n"
        "no errors and no warnings in 4 files\n",
    )


def test_the_lists_of_problems(small: Path, check: Callable[..., Outcome]) -> None:
    edit("train.json", lambda rows: rows.extend([{"image": "a.png"}] * 3 + [{**rows[0], "bbox": [[0, 0, 30, 5]]}]))
    Path("images/b.png").unlink()
    status, out = check("some.yaml", "--show", "2", "--set", "vision_heads=3", "--set", "max_tokens=600")
    assert status == 1
    assert out == (
        "file        checked              count  errors  warnings\n"
        "some.yaml   training config          -       1         1\n"
        "bert.json   BERT config              -       -         -\n"
        "train.json  training entries         4       3         2\n"
        "images      images, all decoded      2       1         -\n"
        "\n"
        "errors\n"
        "  some.yaml: vision_width is 8, which its vision_heads of 3 does not divide\n"
        "  key 'caption' is missing - 3 found:\n"
        "    train.json: entry 3 (a.png)\n"
        "    train.json: entry 4 (a.png)\n"
        "    and 1 more\n"
        "  the image file does not exist; check image_root - 1 found:\n"
        "    train.json: entry 1 (b.png) (images/b.png)\n"
        "\n"
        "warnings\n"
        "  max_tokens is above bert_config's max_position_embeddings: a longer caption would stop the run - 1 found:\n"
        "    some.yaml (600 and 512)\n"
        "  image and text are those of an earlier entry - 1 found:\n"
        "    train.json: entry 6 (a.png) (as entry 0 (a.png))\n"
        "  a box reaches out of its image, or covers no pixel of it - 1 found:\n"
        "    train.json: entry 6 (a.png) ([0, 0, 30, 5] in 20x10)\n"
        "\n"
        "5 errors and 3 warnings in 4 files; docs/data.md says where each file comes from and what it must hold\n"
    )


def test_json(small: Path, check: Callable[..., Outcome]) -> None:
    edit(
        "train.json",
        lambda rows: rows.append({"image": "a.png", "caption": "dog", "bbox": [[0, 0, 30, 5], [0, 0, 9, 9]]}),
    )
    Path("images/b.png").unlink()
    Path("bert.json").unlink()
    status, out = check("some.yaml", "--json")
    assert status == 1

    def row(file: str, checked: str, key: str, count: int | None, errors: int = 0, warnings: int = 0) -> dict[str, Any]:
        named_by = f"{key} of some.yaml" if key else ""
        problems = {"errors": errors, "warnings": warnings}
        return {"file": file, "checked": checked, "named_by": named_by, "count": count, **problems}

    missing = "bert.json: cannot read bert_config (No such file or directory)"
    gone = "the image file does not exist; check image_root"
    out_of_image = "a box reaches out of its image, or covers no pixel of it"
    assert json.loads(out) == {
        "ok": False,
        "errors": 2,
        "warnings": 1,
        "files": [
            row("some.yaml", "training config", "", None),
            row("bert.json", "BERT config", "bert_config", None, 1),
            row("train.json", "training entries", "train_file", 4, 0, 1),
            row("images", "images, all decoded", "image_root", 2, 1),
        ],
        "problems": [
            {"level": "error", "file": "bert.json", "kind": missing, "count": 1, "first": []},
            {
                "level": "error",
                "file": "images",
                "kind": gone,
                "count": 1,
                "first": ["train.json: entry 1 (b.png) (images/b.png)"],
            },
            {
                "level": "warning",
                "file": "train.json",
                "kind": out_of_image,
                "count": 1,
                "first": ["train.json: entry 3 (a.png) ([0, 0, 30, 5] in 20x10)"],
            },
        ],
        "notes": [],
    }


def test_json_alone_is_on_standard_output(place: Path, check: Callable[..., Outcome]) -> None:
    """What the Flickr30k reader says of a folder like eval/ becomes a note."""
    shutil.copytree(FLICKR, "eval")
    keys = ("image_ids_file=[eval/test.txt]", "phrase_box_file=[eval/bounding_boxes_test.json]")
    words = [word for key in (*keys, "sentences_file=[eval/sentences_test.json]") for word in ("--set", key)]
    status, out = check("configs/scenes/Grounding_flickr.yaml", *words, "--json")
    assert status == 0
    notes = json.loads(out)["notes"]
    assert [note["file"] for note in notes] == ["configs/scenes/Grounding_flickr.yaml"] * 2 + ["eval/test.txt"]
    assert notes[0]["note"] == "Flickr30k val: 0 images; published: 1,000"
    assert notes[2]["note"].startswith(
        "eval/test.txt counts as test, by its file name; the release would count it as val"
    )


def test_set_reaches_every_config(small: Path, check: Callable[..., Outcome]) -> None:
    Path("other.yaml").write_text("{matching_file: [pairs.json], image_root: x}")
    words = ["--set", "image_root=images", "--set", "bert_config=other.json", "--set", "image_res=12"]
    content = json.loads(check("some.yaml", "other.yaml", *words, "--json").out)
    files = ["some.yaml", "other.json", "train.json", "other.yaml", "pairs.json", "images"]
    assert [row["file"] for row in content["files"]] == files
    refused = check("some.yaml", "other.yaml", "--set", "amc.layer=2").out
    assert "  other.yaml: unknown key 'amc'" in refused
    assert "  some.yaml: " not in refused
    assert "  some.yaml: --set amc: write key=value" in check("some.yaml", "--set", "amc").out


def test_variables_and_home(small: Path, check: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMC_DATA", raising=False)
    words = ["some.yaml", "--set", "image_root=$AMC_DATA/images", "--set", "train_file=[~/train.json]"]
    status, out = check(*words)
    assert status == 1
    assert "  some.yaml: key 'image_root': the environment variable AMC_DATA is not defined\n" in out
    monkeypatch.setenv("AMC_DATA", str(small))
    monkeypatch.setenv("HOME", str(small))
    status, out = check(*words, "--json")
    assert status == 0
    files = ["some.yaml", "bert.json", f"{small}/train.json", f"{small}/images"]
    assert [row["file"] for row in json.loads(out)["files"]] == files


@pytest.mark.parametrize(
    "words", [[], ["a.yaml", "--sample", "-1"], ["a.yaml", "--workers", "0"], ["a", "--show", "x"]]
)
def test_bad_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        prepare.parse_args(["check", *words])
    assert refused.value.code == 2
    assert "usage: " in capsys.readouterr().err


# ---- images


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(0, ""), (1, "a"), (2, "ad"), (3, "ace"), (6, "abcdef"), (9, "abcdef"), (None, "abcdef")],
)
def test_a_sample_is_spread_evenly(count: int | None, chosen: str) -> None:
    assert evenly("abcdef", count) == set(chosen)


def test_of_images_outside_the_sample_the_header_is_read(place: Path, check: Callable[..., Outcome]) -> None:
    total = TRAIN + 3 * EVALUATION
    for index in range(TRAIN):
        write_cut(f"{S}/images/{index:06d}.jpg")
    expected = [training_box_outside()]
    Path(f"{S}/images/000006.jpg").write_text("no image")
    Path(f"{S}/images/000007.jpg").unlink()
    words = ["configs/scenes/Pretrain.yaml", "--json"]

    def run(*more: str) -> tuple[str, dict[str, int]]:
        content = json.loads(check(*words, *more).out)
        for problem in expected:
            assert_reported(problem, content["problems"])
        kinds = {row["kind"]: row["count"] for row in content["problems"] if row["file"] == f"{S}/images"}
        assert content["files"][-1]["count"] == TRAIN
        return content["files"][-1]["checked"], kinds

    undecodable, missing = (
        "the image cannot be decoded; is the download complete?",
        "the image file does not exist; check image_root",
    )
    assert run("--sample", "0") == ("images, 0 decoded", {undecodable: 1, missing: 1})
    assert run("--sample", "2") == ("images, 2 decoded", {undecodable: 3, missing: 1})
    assert run("--sample", str(total)) == ("images, all decoded", {undecodable: 7, missing: 1})
    assert run() == ("images, all decoded", {undecodable: 7, missing: 1})


def test_processes_change_nothing(place: Path, check: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    for damage in (missing_image, wrong_extension, truncated_image, other_content, training_box_outside):
        damage()
    alone = check(*CONFIGS, "--workers", "1")
    monkeypatch.setattr(check_images, "IMAGES_PER_PROCESS", 1)
    pools: list[int] = []

    class Pool(check_images.ProcessPoolExecutor):
        def __init__(self, processes: int) -> None:
            pools.append(processes)
            super().__init__(processes)

    monkeypatch.setattr(check_images, "ProcessPoolExecutor", Pool)
    assert check(*CONFIGS, "--workers", "2") == alone
    assert pools == [2]


@pytest.mark.parametrize(
    ("name", "kind", "warned"),
    [
        ("a.jpg", "JPEG", False),
        ("a.JPG", "JPEG", False),
        ("a.jpeg", "MPO", False),
        ("a.png", "JPEG", True),
        ("a.jpg", "PNG", True),
        ("a", "PNG", False),
        ("a.image", "JPEG", False),
    ],
)
def test_names_and_formats(name: str, kind: str, warned: bool) -> None:
    row = Report(5).row("images", "images", "")
    note_images(row, {Path(name): "here"}, {Path(name): Seen((1, 1), kind)})
    assert [cases.first for _, cases in row.found("warning")] == ([[f"here ({name}: {kind})"]] if warned else [])
    assert row.total("error") == 0


def test_whatever_a_broken_image_raises_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (3, 2)).save(tmp_path / "a.png")
    assert look((tmp_path / "a.png", True)) == Seen((2, 3), "PNG")
    assert look((tmp_path / "a.png" / "b.png", True)) == Seen(problem="")

    def fail(*_: object) -> None:
        raise EOFError

    monkeypatch.setattr(Image.Image, "convert", fail)
    assert look((tmp_path / "a.png", True)) == Seen((2, 3), "PNG", "EOFError")
    assert look((tmp_path / "a.png", False)) == Seen((2, 3), "PNG")


# ---- going on


def test_what_entries_hold_is_checked_without_the_tables(place: Path, check: Callable[..., Outcome]) -> None:
    """No refs, no detections: the other table, the entries' own keys and their images are still checked."""
    refs, detections = f"{REFCOCO}/refs(unc).p", f"{REFCOCO}/dets.json"
    write_cut(refs)
    write_cut(detections)
    edit(f"{REFCOCO}/instances.json", lambda tables: tables["annotations"][0].pop("id"))
    edit(REFCOCO_TEST, lambda rows: rows[0].pop("text"))
    Path(f"{S}/images/{load(REFCOCO_TEST)[-1]['image']}").unlink()
    content = json.loads(check("configs/scenes/Grounding_refcoco.yaml", "--json").out)
    errors = {row["file"]: row["errors"] for row in content["files"] if row["errors"]}
    assert errors == {refs: 1, detections: 1, f"{REFCOCO}/instances.json": 1, REFCOCO_TEST: 1, f"{S}/images": 1}
    assert content["notes"] == []


@pytest.mark.parametrize(
    ("broken", "others"),
    [
        ("val.txt", set()),
        ("bounding_boxes_val.json", {"sentences_val.json"}),
        ("sentences_val.json", {"bounding_boxes_val.json"}),
    ],
)
def test_the_other_files_of_a_split_are_still_checked(
    broken: str, others: set[str], place: Path, check: Callable[..., Outcome]
) -> None:
    phrase_box_outside()
    sentence_without_phrases()
    Path(f"{FLICKR}/{broken}").write_bytes(b"\xff")
    status, out = check("configs/scenes/Grounding_flickr.yaml", "--json")
    assert status == 1
    content = json.loads(out)
    assert {row["file"] for row in content["files"] if row["errors"]} == {
        f"{FLICKR}/{name}" for name in {broken, *others}
    }
    counts = {row["file"]: row["count"] for row in content["files"]}
    assert counts[f"{FLICKR}/val.txt"] == (None if broken == "val.txt" else EVALUATION)


@pytest.mark.parametrize(
    ("files", "content", "said"),
    [
        ([f"{REFCOCO}/refcoco+_val.json"], "[]", "holds no entries"),
        ([f"{S}/matching_val.json"], "[]", "holds no pairs"),
        ([PHRASES], "[]", "holds no entries"),
        ([f"{FLICKR}/val.txt"], "\n", "lists no image ids"),
        ([f"{FLICKR}/sentences_val.json"], None, "no phrase has boxes; do the files match?"),
    ],
)
def test_files_that_hold_nothing(
    files: list[str], content: str | None, said: str, place: Path, check: Callable[..., Outcome]
) -> None:
    (file,) = files
    Path(file).write_text(content or json.dumps({image_id: [] for image_id in load(file)}))
    status, out = check(*CONFIGS)
    assert status == 1
    assert f"  {file}: {said} [" in out
    assert "1 error and no warnings in 27 files" in out


# ---- configs


def test_every_config_is_of_a_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.yaml").write_text("{image_root: x}")
    Path("broken.yaml").write_text("{image_root: ")
    status, out = check("odd.yaml", "broken.yaml", "absent.yaml")
    assert status == 1
    assert "  odd.yaml: cannot tell whether it is of training" in out
    assert "  broken.yaml: not valid YAML" in out
    assert "  absent.yaml: cannot read the config (No such file or directory)\n" in out
    assert "3 errors and no warnings in 3 files" in out


@pytest.mark.parametrize(
    ("overrides", "level", "said"),
    [
        (["vision_width=12"], "error", "some.yaml: vision_width is 12 but bert_config has encoder_width 8"),
        (["image_res=10"], "error", "some.yaml: image_res is 10, which its patch_size of 4 does not divide"),
        (["amc.layer=0"], "error", "some.yaml: amc.layer is 0; the fusion layers are 1 to 2"),
        (["train_file=[]"], "error", "some.yaml: train_file lists no files"),
        (["vit_init=deit.pth"], "error", "deit.pth: no such file"),
        (["vit_init=bert.json"], None, ""),
        (["max_tokens=512"], None, ""),
        (["max_tokens=513"], "warning", "max_tokens is above bert_config's max_position_embeddings: a longer"),
        (["bert_config=train.json"], "error", "train.json: key '': Input should be"),
    ],
)
def test_training_configs(
    overrides: list[str], level: str | None, said: str, small: Path, check: Callable[..., Outcome]
) -> None:
    words = [word for item in overrides for word in ("--set", item)]
    status, out = check("some.yaml", *words, "--json")
    problems = json.loads(out)["problems"]
    assert status == int(level == "error")
    assert [(row["level"], row["kind"][: len(said)]) for row in problems] == ([(level, said)] if level else [])


def test_amc_needs_boxes(small: Path, check: Callable[..., Outcome]) -> None:
    edit("train.json", lambda rows: [row.update(box=row.pop("bbox")) for row in rows])
    status, out = check("some.yaml", "--json")
    (problem,) = json.loads(out)["problems"]
    assert (status, problem["level"], problem["file"], problem["first"]) == (0, "warning", "some.yaml", ["some.yaml"])
    assert problem["kind"].startswith("add_gcam is True, but no entry has boxes")
    assert json.loads(check("some.yaml", "--json", "--set", "add_gcam=False").out)["problems"] == []
    # Nothing is known of the boxes of a file that cannot be read.
    words = ["--set", "train_file=[train.json, absent.json]"]
    assert [row["file"] for row in json.loads(check("some.yaml", "--json", *words).out)["problems"]] == ["absent.json"]


REFCOCO_CONFIG, FLICKR_CONFIG = "configs/scenes/Grounding_refcoco.yaml", "configs/scenes/Grounding_flickr.yaml"
NO_DATA = ["image_ids_file=[]", "phrase_box_file=[]", "sentences_file=[]"]


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        (REFCOCO_CONFIG, ["block_num=1"], f"{REFCOCO_CONFIG}: block_num is 1; the fusion layers are 2 to 4"),
        (REFCOCO_CONFIG, ["block_num=5"], f"{REFCOCO_CONFIG}: block_num is 5; the fusion layers are 2 to 4"),
        (REFCOCO_CONFIG, ["block_num=4"], None),
        (REFCOCO_CONFIG, ["det_file="], f"{REFCOCO_CONFIG}: the config lacks 'det_file', which this benchmark needs"),
        (REFCOCO_CONFIG, ["test_file=[]"], f"{REFCOCO_CONFIG}: the config lacks 'test_file'"),
        (REFCOCO_CONFIG, ["image_root=nowhere"], "nowhere: no such folder"),
        (FLICKR_CONFIG, ["sentences_file=[a]"], f"{FLICKR_CONFIG}: image_ids_file, phrase_box_file and sentences_file"),
        (FLICKR_CONFIG, ["sentences_file=[]"], f"{FLICKR_CONFIG}: the config lacks 'sentences_file'"),
        (FLICKR_CONFIG, NO_DATA, f"{FLICKR_CONFIG}: names no data; it needs test_file and refcoco_data, or image_ids"),
        (FLICKR_CONFIG, [*NO_DATA, f"matching_file=[{S}/matching_val.json]"], None),
    ],
)
def test_evaluation_configs(
    config: str, overrides: list[str], said: str | None, place: Path, check: Callable[..., Outcome]
) -> None:
    words = [word for item in overrides for word in ("--set", item)]
    status, out = check(config, *words, "--json")
    kinds = [row["kind"] for row in json.loads(out)["problems"]]
    assert status == (0 if said is None else 1)
    assert [kind[: len(said or "")] for kind in kinds] == ([] if said is None else [said])


@pytest.mark.parametrize(
    ("path", "test_file", "det_file", "refclef"),
    [
        ("configs/mine.yaml", "data/refclef_test.json", "unused.json", True),
        ("configs/Grounding_RefCLEF.yaml", "data/test.json", "unused.json", True),
        ("refclef/Grounding_refcoco.yaml", "refclef/test.json", None, False),
        ("configs/mine.yaml", "data/test.json", None, True),
        ("configs/mine.yaml", "data/test.json", "dets.json", False),
    ],
)
def test_refclef_is_told_from_refcoco(path: str, test_file: str, det_file: str | None, refclef: bool) -> None:
    config = GroundingConfig(image_root="x", test_file=[test_file], det_file=det_file)
    assert is_refclef(path, config) == refclef


def test_a_size_that_the_annotation_lacks_is_the_file_s(place: Path, check: Callable[..., Outcome]) -> None:
    """REFER's images may have no size: boxes are then held against the image file."""
    edit(f"{REFCOCO}/instances.json", lambda tables: [row.pop("width") for row in tables["images"]])
    problem = annotation_outside()
    content = json.loads(check(REFCOCO_CONFIG, "--json").out)
    assert len(content["problems"]) == 1
    assert_reported(problem, content["problems"])
