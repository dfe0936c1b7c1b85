"""`prepare.py check`: what it says of configs, of the benchmarks they name, and of the sizes of splits."""

import json
from pathlib import Path
from typing import Any

import pytest

import prepare
from config import GroundingConfig
from dataset.raw.check import benchmarks_of
from tests.dataset.raw.check_damage import FLICKR_CONFIG, REFCOCO, REFCOCO_CONFIG, ROOT, Check, edit, load
from tests.dataset.raw.raw_layouts import write_refer

pytestmark = pytest.mark.slow


# ---- sizes


def test_splits_of_other_sizes_are_noted(place: Path, check: Check) -> None:
    out = check(REFCOCO_CONFIG, FLICKR_CONFIG).out
    config = "  configs/scenes/Grounding_refcoco.yaml: RefCOCO+ (unc)"
    expressions = len(load(f"{REFCOCO}/refcoco+_val.json"))
    assert f"{config} val: {expressions} expressions; published: 10,758\n{config} testA: " in out
    assert "expressions; published: 5,726\n" in out
    assert "expressions; published: 4,889\n" in out
    config = "  configs/scenes/Grounding_flickr.yaml: Flickr30k"
    assert f"{config} val: 4 images; published: 1,000\n{config} test: 8 images; published: 1,000\n" in out


def test_splits_of_the_published_size_are_not(place: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
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
    check: Check,
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
    check: Check,
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


def test_shipped_configs_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
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


# ---- configs


def test_every_config_is_of_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
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
def test_training_configs(overrides: list[str], level: str | None, said: str, small: Path, check: Check) -> None:
    words = [word for item in overrides for word in ("--set", item)]
    status, out = check("some.yaml", *words, "--json")
    problems = json.loads(out)["problems"]
    assert status == int(level == "error")
    assert [(row["level"], row["kind"][: len(said)]) for row in problems] == ([(level, said)] if level else [])


def test_amc_needs_boxes(small: Path, check: Check) -> None:
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
def test_evaluation_configs(config: str, overrides: list[str], said: str | None, place: Path, check: Check) -> None:
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
    name: str, refs: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Check
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


def test_a_released_refclef_config_names_detections_that_are_not_read(place: Path, check: Check) -> None:
    assert check("configs/scenes/Grounding_refclef.yaml", "--set", "det_file=nowhere.json").status == 0
