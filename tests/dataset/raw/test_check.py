"""`prepare.py check`: scenes as generated pass; every kind of damage to them is named by file and entry, in one run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

import prepare
from config import GroundingConfig
from dataset.expressions import DataFile
from dataset.raw import check_images
from dataset.raw.check import benchmarks_of
from dataset.raw.check_images import Seen, evenly, inspect_image, note_images
from tests.dataset.raw.check_damage import (
    CAPTIONS,
    DAMAGE,
    FLICKR,
    PHRASES,
    REFCLEF,
    REFCOCO,
    REFCOCO_TEST,
    SCENES,
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
from tests.dataset.raw.raw_layouts import write_refer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(f"configs/scenes/{path.name}" for path in (ROOT / "configs" / "scenes").glob("*.yaml"))
REFCOCO_CONFIG, FLICKR_CONFIG = "configs/scenes/Grounding_refcoco.yaml", "configs/scenes/Grounding_flickr.yaml"
TRAIN, EVALUATION = 8, 4  # scenes


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
    shutil.copytree(scenes, tmp_path / SCENES)
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
    assert counts[f"{SCENES}/images"] == str(TRAIN + 3 * EVALUATION)
    assert counts[f"{FLICKR}/test.txt"] == counts[f"{FLICKR}/bounding_boxes_test.json"] == str(2 * EVALUATION)
    manifest = load(f"{SCENES}/scenes.json")["counts"]
    assert counts[f"{REFCLEF}/refs(unc).p"] == str(manifest["refclef"])
    assert counts[f"{FLICKR}/sentences_val.json"] == str(manifest["flickr val"])
    assert counts[f"{SCENES}/matching_val.json"] == str(manifest["matching_val.json"])
    assert counts[f"{REFCOCO}/refcoco+_val.json"] == str(len(load(f"{REFCOCO}/refcoco+_val.json")))


def test_splits_of_other_sizes_are_noted(place: Path, check: Callable[..., Outcome]) -> None:
    out = check(REFCOCO_CONFIG, FLICKR_CONFIG).out
    config = "  configs/scenes/Grounding_refcoco.yaml: RefCOCO+ (unc)"
    expressions = len(load(f"{REFCOCO}/refcoco+_val.json"))
    assert f"{config} val: {expressions} expressions; published: 10,758\n{config} testA: " in out
    assert "expressions; published: 5,726\n" in out
    assert "expressions; published: 4,889\n" in out
    config = "  configs/scenes/Grounding_flickr.yaml: Flickr30k"
    assert f"{config} val: 4 images; published: 1,000\n{config} test: 8 images; published: 1,000\n" in out


def test_splits_of_the_published_size_are_not(
    place: Path, check: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataset.raw.check.PUBLISHED", {"Flickr30k": {"val": 4, "test": 8}})
    assert "notes" not in check(FLICKR_CONFIG).out


BERKELEY = {"val": 1_000, "test": 10_000}
UNC = {"val": 2_000, "testA": 485, "testB": 490, "testC": 465}
OF_BERKELEY = (
    "by the numbers of their images the test files are of the berkeley split, while refs are looked up in refs(unc)"
)


@pytest.mark.parametrize(
    ("split_by", "images", "notes"),
    [
        ("berkeley", BERKELEY, []),
        ("berkeley", {"val": 1_000, "test": 9_999}, []),  # without an image that REFER's archive lacks
        ("unc", UNC, []),
        ("unc", BERKELEY, [OF_BERKELEY]),  # the released files and config
        (
            "berkeley",
            {"val": 1_001, "test": 9_000},
            [
                "RefCLEF (berkeley) val: 1,001 images; published: 1,000",
                "RefCLEF (berkeley) test: 9,000 images; published: 10,000",
            ],
        ),
        (
            "unc",
            {"val": 2_000},
            [f"RefCLEF (unc) {s}: 0 images; published: {UNC[s]}" for s in ("testA", "testB", "testC")],
        ),
    ],
)
def test_the_sizes_of_refclef_s_splits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[..., Outcome],
    split_by: str,
    images: dict[str, int],
    notes: list[str],
) -> None:
    """Images are counted, each once however many expressions it has."""
    monkeypatch.chdir(tmp_path)
    names = [(split, i) for split, count in images.items() for i in range(count)]
    ids = {name: number for number, name in enumerate(names)}
    refs = [{"ref_id": n, "ann_id": n, "image_id": n, "split": split} for (split, _), n in ids.items()]
    instances = {"annotations": [{"id": n, "bbox": [0, 0, 5, 5]} for n in ids.values()], "images": []}
    write_refer(Path("refer/refclef"), split_by, refs, instances)
    rows = [
        {"image": f"{n}.jpg", "text": text, "ref_id": n, "split": split}
        for (split, _), n in ids.items()
        for text in "ab"
    ]
    for part in ("val", "test"):
        Path(f"refclef_{part}.json").write_text(json.dumps([row for row in rows if row["split"].startswith(part)]))
    keys = {"test_file": ["refclef_val.json", "refclef_test.json"], "refcoco_data": "refer", "image_root": "nowhere"}
    Path("clef.yaml").write_text(json.dumps(keys | {"refer_split": split_by}))
    found = [note["note"] for note in json.loads(check("clef.yaml", "--json").out)["notes"]]
    assert [note[: len(start)] for note, start in zip(found, notes, strict=True)] == notes


@pytest.mark.parametrize(
    ("dataset", "split_by", "sizes"),
    [
        ("refcoco", "unc", {"val": 10_834, "testA": 5_657, "testB": 5_095}),
        ("refcoco+", "unc", {"val": 10_758, "testA": 5_726, "testB": 4_889}),
        ("refcocog", "umd", {"val": 4_896, "test": 9_602}),
    ],
)
def test_the_lists_that_prepare_makes_of_refs_of_the_published_sizes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[..., Outcome],
    dataset: str,
    split_by: str,
    sizes: dict[str, int],
) -> None:
    """Repeated sentences count, as they do in the papers."""
    monkeypatch.chdir(tmp_path)
    refs: list[dict[str, Any]] = []
    for n, (split, size) in enumerate(sizes.items()):
        sentences = [{"sent": "the same" if i % 7 else f"left {i}"} for i in range(size)]
        refs.append({"ref_id": n, "ann_id": n, "image_id": n, "split": split, "sentences": sentences})
    instances = {"annotations": [{"id": row["ref_id"], "bbox": [0, 0, 5, 5]} for row in refs]}
    write_refer(Path("refer", dataset), split_by, refs, instances | {"images": [{"id": row["ref_id"]} for row in refs]})
    args = prepare.parse_args(["refer", "refer", "--dataset", dataset, "--out", "out"])
    args.run(args)
    keys = {"test_file": [f"out/{dataset}_{part}.json" for part in ("val", "test")], "refcoco_data": "refer"}
    Path("dets.json").write_text(json.dumps({str(row["ref_id"]): [] for row in refs}))
    keys |= {"image_root": "nowhere", "det_file": "dets.json", "refer_dataset": dataset, "refer_split": split_by}
    Path("some.yaml").write_text(json.dumps(keys))
    assert json.loads(check("some.yaml", "--json").out)["notes"] == []
    args = prepare.parse_args(["refer", "refer", "--dataset", dataset, "--out", "out", "--no-keep-repeated"])
    args.run(args)
    assert len(json.loads(check("some.yaml", "--json").out)["notes"]) == len(sizes)


def test_shipped_configs_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[..., Outcome]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    status, out = check("configs/Pretrain.yaml", "configs/Grounding_refcoco.yaml")
    errors = out.split("\n\n")[1].splitlines()[1:]
    missing = "cannot be read (No such file or directory); check"
    of_refcoco = "of configs/Grounding_refcoco.yaml]"
    assert status == 1
    assert [line.split(":")[0] for line in errors] == [
        *(f"  data/vg_{name}.json" for name in ("descriptions", "attributes_spatial", "attributes")),
        *(f"  data/refer/refcoco+/{name}" for name in ("refs(unc).p", "instances.json")),
        *(f"  data/refcoco+/{name}.json" for name in ("dets", "refcoco+_val", "refcoco+_test")),
        *("  data/vg/", "  data/coco/train2014"),
    ]
    assert errors[0].endswith(f": {missing} the path in the config [train_file of configs/Pretrain.yaml]")
    assert errors[3].endswith(f": {missing} refcoco_data in the config [refcoco_data {of_refcoco}")
    assert errors[5].endswith(f": {missing} the path in the config [det_file {of_refcoco}")
    assert errors[9].endswith(f": no such folder [image_root {of_refcoco}")
    last = "10 errors and no warnings in 13 files; docs/data.md says where each file comes from and what it must hold"
    assert out.splitlines()[-1] == last


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


def test_json_alone_is_on_standard_output(place: Path, check: Callable[..., Outcome]) -> None:
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


def test_what_entries_hold_is_checked_without_the_tables(place: Path, check: Callable[..., Outcome]) -> None:
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


def test_phrases_that_stand_for_nothing_need_no_boxes(place: Path, check: Callable[..., Outcome]) -> None:
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
def test_the_other_files_of_a_split_are_still_checked(
    broken: str, others: set[str], place: Path, check: Callable[..., Outcome]
) -> None:
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
    edit("train.json", lambda rows: [row.update(regions=row.pop("bbox")) for row in rows])
    status, out = check("some.yaml", "--json")
    (problem,) = json.loads(out)["problems"]
    assert (status, problem["level"], problem["file"], problem["first"]) == (0, "warning", "some.yaml", ["some.yaml"])
    assert problem["kind"].startswith("add_gcam is True, but no entry has boxes")
    assert json.loads(check("some.yaml", "--json", "--set", "add_gcam=False").out)["problems"] == []
    # Nothing is known of the boxes of a file that cannot be read.
    words = ["--set", "train_file=[train.json, absent.json]"]
    assert [row["file"] for row in json.loads(check("some.yaml", "--json", *words).out)["problems"]] == ["absent.json"]


NO_DATA = ["benchmark=", "test_file=[]", "refcoco_data=", "det_file="]


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        (REFCOCO_CONFIG, ["block_num=1"], f"{REFCOCO_CONFIG}: block_num is 1; the fusion layers are 2 to 4"),
        (REFCOCO_CONFIG, ["block_num=5"], f"{REFCOCO_CONFIG}: block_num is 5; the fusion layers are 2 to 4"),
        (REFCOCO_CONFIG, ["block_num=4"], None),
        (REFCOCO_CONFIG, ["det_file="], f"{REFCOCO_CONFIG}: the config lacks 'det_file', which this benchmark needs"),
        (REFCOCO_CONFIG, ["test_file=[]"], f"{REFCOCO_CONFIG}: the config lacks 'test_file'"),
        (REFCOCO_CONFIG, ["image_root=nowhere"], "nowhere: no such folder"),
        (
            REFCOCO_CONFIG,
            ["refer_split=umd"],
            f"{REFCOCO_CONFIG}: refcoco+ is split by unc, not by umd; correct refer_",
        ),
        (FLICKR_CONFIG, ["sentences_file=[a]"], f"{FLICKR_CONFIG}: image_ids_file, phrase_box_file and sentences_file"),
        (FLICKR_CONFIG, ["sentences_file=[]"], f"{FLICKR_CONFIG}: the config lacks 'sentences_file'"),
        (
            REFCOCO_CONFIG,
            [*NO_DATA, "matching_file=[]"],
            f"{REFCOCO_CONFIG}: names no data; it needs test_file and ref",
        ),
        (REFCOCO_CONFIG, NO_DATA, None),
        (REFCOCO_CONFIG, ["benchmark=mine"], f"{REFCOCO_CONFIG}: benchmark is 'mine', which is none of refcoco+, "),
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
    ("name", "refs", "said"),
    [
        ("Grounding_refcoco_unc.yaml", "refcoco/refs(unc).p", "evaluation config, RefCOCO (unc)"),
        ("Grounding_refcocog.yaml", "refcocog/refs(umd).p", "evaluation config, RefCOCOg (umd)"),
        ("Grounding_refclef.yaml", "refclef/refs(unc).p", "evaluation config, RefCLEF (unc)"),
    ],
)
def test_the_config_s_refer_dataset_and_split(
    name: str, refs: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[..., Outcome]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    files = json.loads(check(f"configs/{name}", "--json").out)["files"]
    assert files[0]["checked"] == said
    assert files[2]["file"] == f"data/refer/{refs}"


@pytest.mark.parametrize(
    ("path", "test_file", "det_file", "benchmark"),
    [
        ("configs/mine.yaml", "data/refclef_test.json", "unused.json", "refclef"),
        ("configs/Grounding_RefCLEF.yaml", "data/test.json", "unused.json", "refclef"),
        ("refclef/Grounding_refcoco.yaml", "refclef/test.json", None, "refcocog"),
        ("configs/mine.yaml", "data/test.json", None, "refclef"),
        ("configs/mine.yaml", "data/test.json", "dets.json", "refcocog"),
    ],
)
def test_the_benchmark_of_a_config_that_does_not_name_it(
    path: str, test_file: str, det_file: str | None, benchmark: str
) -> None:
    config = GroundingConfig(image_root="x", test_file=[test_file], det_file=det_file, refer_dataset="refcocog")
    assert benchmarks_of(path, config) == [benchmark]
    assert benchmarks_of(path, config.model_copy(update={"sentences_file": ["x"]})) == [benchmark, "flickr"]
    assert benchmarks_of(path, config.model_copy(update={"benchmark": "own"})) == ["own"]


def test_a_released_refclef_config_names_detections_that_are_not_read(
    place: Path, check: Callable[..., Outcome]
) -> None:
    assert check("configs/scenes/Grounding_refclef.yaml", "--set", "det_file=nowhere.json").status == 0
