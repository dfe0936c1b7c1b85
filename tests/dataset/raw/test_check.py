"""`prepare.py check`: scenes as generated pass; every kind of damage to them is named by file and entry, in one run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import prepare
from dataset.expressions import DataFile
from dataset.raw import check_images
from dataset.raw.check_images import Seen, evenly, inspect_image, note_images
from tests.dataset.raw.check_damage import (
    CAPTIONS,
    CONFIGS,
    DAMAGE,
    EVALUATION,
    FLICKR,
    FLICKR_CONFIG,
    PHRASES,
    REFCLEF,
    REFCOCO,
    REFCOCO_CONFIG,
    REFCOCO_TEST,
    SCENES,
    TRAIN,
    Check,
    Problem,
    edit,
    load,
    missing_image,
    other_content,
    phrase_box_outside,
    sentence_without_phrases,
    training_box_outside,
    truncated_image,
    write_cut,
    wrong_extension,
)

pytestmark = pytest.mark.slow


def test_scenes_as_generated_are_fine(place: Path, check: Check) -> None:
    status, out = check(*CONFIGS)
    assert status == 0
    assert out.splitlines()[-1] == "no errors and no warnings in 34 files"
    lines = [line.split() for line in out.split("\n\n")[0].splitlines()]
    assert lines[0] == ["file", "checked", "count", "errors", "warnings"]
    assert all(line[-2:] == ["-", "-"] for line in lines[1:])
    counts = {line[0]: line[-3] for line in lines[1:]}
    assert len(counts) == 34
    assert counts[CAPTIONS] == str(len(load(CAPTIONS))) == str(TRAIN)
    assert counts[PHRASES] == str(len(load(PHRASES)))
    assert counts[f"{SCENES}/images"] == str(TRAIN + 3 * EVALUATION)
    assert counts[f"{FLICKR}/test.txt"] == counts[f"{FLICKR}/bounding_boxes_test.json"] == str(2 * EVALUATION)
    manifest = load(f"{SCENES}/scenes.json")["counts"]
    assert counts[f"{REFCLEF}/refs(unc).p"] == str(manifest["refclef"])
    assert counts[f"{FLICKR}/sentences_val.json"] == str(manifest["flickr val"])
    assert counts[f"{SCENES}/matching_val.json"] == str(manifest["matching_val.json"])
    assert counts[f"{REFCOCO}/refcoco+_val.json"] == str(len(load(f"{REFCOCO}/refcoco+_val.json")))


# ---- damage


def assert_reported(problem: Problem, reported: list[dict[str, Any]]) -> None:
    (found,) = [
        row for row in reported if (row["level"], row["file"]) == problem[:2] and row["kind"].startswith(problem.kind)
    ]
    assert found["count"] == max(1, len(problem.first))
    assert len(found["first"]) == len(problem.first)
    for place, start in zip(found["first"], problem.first, strict=True):
        assert place.startswith(start)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_by_file_and_entry(damage: Callable[[], Problem], place: Path, check: Check) -> None:
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


def test_all_damage_in_one_run(place: Path, check: Check) -> None:
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


def test_the_table_when_all_is_fine(small: Path, check: Check) -> None:
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


def test_the_lists_of_problems(small: Path, check: Check) -> None:
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


def test_json(small: Path, check: Check) -> None:
    edit("train.json", lambda rows: rows.append({**rows[0], "caption": "dog", "bbox": [[0, 0, 30, 5], [0, 0, 9, 9]]}))
    Path("images/b.png").unlink()
    Path("bert.json").unlink()
    status, out = check("some.yaml", "--json")
    assert status == 1

    files = [
        ("some.yaml", "training config", "", None, 0, 0),
        ("bert.json", "BERT config", "bert_config of some.yaml", None, 1, 0),
        ("train.json", "training entries", "train_file of some.yaml", 4, 0, 1),
        ("images", "images, all decoded", "image_root of some.yaml", 2, 1, 0),
    ]
    no_file = "bert.json: cannot read bert_config (No such file or directory)"
    gone, at_b = "the image file does not exist; check image_root", "train.json: entry 1 (b.png) (images/b.png)"
    outside = "a box reaches out of its image, or covers no pixel of it"
    at_a = "train.json: entry 3 (a.png) ([0, 0, 30, 5] in 20x10)"
    problems = [
        ("error", "bert.json", no_file, 1, []),
        ("error", "images", gone, 1, [at_b]),
        ("warning", "train.json", outside, 1, [at_a]),
    ]
    keys_of_files = ("file", "checked", "named_by", "count", "errors", "warnings")
    assert json.loads(out) == {
        "ok": False,
        "errors": 2,
        "warnings": 1,
        "files": [dict(zip(keys_of_files, row, strict=True)) for row in files],
        "problems": [dict(zip(("level", "file", "kind", "count", "first"), row, strict=True)) for row in problems],
        "notes": [],
    }


def test_json_alone_is_on_standard_output(place: Path, check: Check) -> None:
    """What the Flickr30k reader says of a folder like eval/ becomes a note."""
    shutil.copytree(FLICKR, "eval")
    keys = ("image_ids_file=[eval/test.txt]", "phrase_box_file=[eval/bounding_boxes_test.json]")
    words = [word for key in (*keys, "sentences_file=[eval/sentences_test.json]") for word in ("--set", key)]
    status, out = check(FLICKR_CONFIG, *words, "--json")
    assert status == 0
    notes = json.loads(out)["notes"]
    assert [note["file"] for note in notes] == ["configs/scenes/Grounding_flickr.yaml"] * 2 + ["eval/test.txt"]
    assert notes[0]["note"] == "Flickr30k val: 0 images; published: 1,000"
    assert notes[2]["note"].startswith(
        "eval/test.txt counts as test, by its file name; the release would count it as val"
    )


def test_set_reaches_every_config(small: Path, check: Check) -> None:
    Path("other.yaml").write_text("{matching_file: [pairs.json], image_root: x}")
    words = ["--set", "image_root=images", "--set", "bert_config=other.json", "--set", "image_res=12"]
    content = json.loads(check("some.yaml", "other.yaml", *words, "--json").out)
    files = ["some.yaml", "other.json", "train.json", "other.yaml", "pairs.json", "images"]
    assert [row["file"] for row in content["files"]] == files
    refused = check("some.yaml", "other.yaml", "--set", "amc.layer=2").out
    assert "  other.yaml: unknown key 'amc'" in refused
    assert "  some.yaml: " not in refused
    assert "  some.yaml: --set amc: write key=value" in check("some.yaml", "--set", "amc").out


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


def test_of_images_outside_the_sample_the_header_is_read(place: Path, check: Check) -> None:
    total = TRAIN + 3 * EVALUATION
    for index in range(TRAIN):
        write_cut(f"{SCENES}/images/{index:06d}.jpg")
    expected = [training_box_outside()]
    Path(f"{SCENES}/images/000006.jpg").write_text("no image")
    Path(f"{SCENES}/images/000007.jpg").unlink()
    words = ["configs/scenes/Pretrain.yaml", "--json"]

    def run(*more: str) -> tuple[str, dict[str, int]]:
        content = json.loads(check(*words, *more).out)
        for problem in expected:
            assert_reported(problem, content["problems"])
        kinds = {row["kind"]: row["count"] for row in content["problems"] if row["file"] == f"{SCENES}/images"}
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


def test_processes_change_nothing(place: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("a.JPG", "PNG", True),
        ("a.jpeg", "MPO", False),
        ("a.png", "JPEG", True),
        ("a.jpg", "PNG", True),
        ("a", "PNG", False),
        ("a.image", "JPEG", False),
    ],
)
def test_names_and_formats(name: str, kind: str, warned: bool) -> None:
    file = DataFile("images", "images", "")
    note_images(file, {Path(name): "here"}, {Path(name): Seen((1, 1), kind)})
    assert list(file.remarks.kinds.values()) == ([[f"here ({name}: {kind})"]] if warned else [])
    assert not file.problems.kinds


def test_whatever_a_broken_image_raises_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (3, 2)).save(tmp_path / "a.png")
    assert inspect_image((tmp_path / "a.png", True)) == Seen((2, 3), "PNG")
    assert inspect_image((tmp_path / "a.png" / "b.png", True)) == Seen(problem="")

    def fail(*_: object) -> None:
        raise EOFError

    monkeypatch.setattr(Image.Image, "convert", fail)
    assert inspect_image((tmp_path / "a.png", True)) == Seen((2, 3), "PNG", "EOFError")
    assert inspect_image((tmp_path / "a.png", False)) == Seen((2, 3), "PNG")


# ---- going on


def test_what_entries_hold_is_checked_without_the_tables(place: Path, check: Check) -> None:
    """No refs, no detections: the other table, the entries' own keys and their images are still checked."""
    Path(f"{REFCOCO}/dets.json").rename("dets.json")
    problems = json.loads(check(REFCOCO_CONFIG, "--json").out)["problems"]
    assert [row["file"] for row in problems] == [f"{REFCOCO}/dets.json"]
    Path("dets.json").rename(f"{REFCOCO}/dets.json")
    refs, detections = f"{REFCOCO}/refs(unc).p", f"{REFCOCO}/dets.json"
    write_cut(refs)
    write_cut(detections)
    edit(f"{REFCOCO}/instances.json", lambda tables: tables["annotations"][0].pop("id"))
    edit(REFCOCO_TEST, lambda rows: rows[0].pop("text"))
    Path(f"{SCENES}/images/{load(REFCOCO_TEST)[-1]['image']}").unlink()
    content = json.loads(check(REFCOCO_CONFIG, "--json").out)
    errors = {row["file"]: row["errors"] for row in content["files"] if row["errors"]}
    assert errors == {refs: 1, detections: 1, f"{REFCOCO}/instances.json": 1, REFCOCO_TEST: 1, f"{SCENES}/images": 1}
    assert content["notes"] == []


def test_phrases_that_stand_for_nothing_need_no_boxes(place: Path, check: Check) -> None:
    """Flickr30k Entities gives them all the id 0."""
    row = {"first_word_index": 0, "phrase": "it", "phrase_id": "0", "phrase_type": ["notvisual"]}
    edit(f"{FLICKR}/sentences_val.json", lambda sentences: sentences["100000"][0]["phrases"].append(row))
    assert "no errors and no warnings" in check(FLICKR_CONFIG).out


@pytest.mark.parametrize(
    ("broken", "others"),
    [
        ("val.txt", set()),
        ("bounding_boxes_val.json", {"sentences_val.json"}),
        ("sentences_val.json", {"bounding_boxes_val.json"}),
    ],
)
def test_the_other_files_of_a_split_are_still_checked(broken: str, others: set[str], place: Path, check: Check) -> None:
    phrase_box_outside()
    sentence_without_phrases()
    Path(f"{FLICKR}/{broken}").write_bytes(b"\xff")
    status, out = check(FLICKR_CONFIG, "--json")
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
        ([f"{SCENES}/matching_val.json"], "[]", "holds no entries"),
        ([PHRASES], "[]", "holds no entries"),
        ([f"{FLICKR}/val.txt"], "\n", "lists no image ids"),
        ([f"{FLICKR}/sentences_val.json"], None, "no phrase has boxes; do the files match?"),
    ],
)
def test_files_that_hold_nothing(files: list[str], content: str | None, said: str, place: Path, check: Check) -> None:
    (file,) = files
    Path(file).write_text(content or json.dumps({image_id: [] for image_id in load(file)}))
    status, out = check(*CONFIGS)
    assert status == 1
    assert f"  {file}: {said} [" in out
    assert "1 error and no warnings in 34 files" in out
