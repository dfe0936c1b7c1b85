"""Which stored results are taken for those that are asked for: what changes them, what does not, what is no result."""

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import files
import utils
from config import GroundingConfig, load_config
from grounding import evaluate as program
from grounding import identity, questions
from grounding.benchmarks import FLICKR, REFCLEF, REFCOCO_PLUS
from grounding.report.rows import ReportError, Source, read_maps
from grounding.results import ResultError, ResultFolder
from models.checkpoint import CheckpointError
from tests.grounding import test_evaluate as base
from tests.grounding.test_evaluate import ONE, evaluate, log, results, write_config
from utils import UserError

place = base.place
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
Change = Callable[[Path], list[str]]  # of a place; returns the options of the second evaluation


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    """A copy of the place that may be changed."""
    return copied(place, tmp_path / "own")


def copied(place: Path, to: Path) -> Path:
    shutil.copytree(place, to)
    for config in to.glob("*.yaml"):
        config.write_text(config.read_text().replace(str(place), str(to)))
    return to


def matching(place: Path) -> list[str]:
    return ["--set", f"matching_file=[{place / 'data' / 'matching_val.json'}]"]


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, building a model fails."""
    return lambda: monkeypatch.setattr(questions, "build_model", None)


def edit_json(path: Path, change: Callable[[Any], object]) -> list[str]:
    """Change a JSON file in place."""
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))
    return []


def same_size_and_time(path: Path, content: bytes) -> list[str]:
    before = path.stat()
    assert len(content) == before.st_size
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return []


def refer(place: Path, name: str) -> Path:
    return place / "data" / "refer" / "refcoco+" / name


def first_word(place: Path) -> list[str]:
    return edit_json(refer(place, "refcoco+_val.json"), lambda rows: rows[0].update(text="the red star"))


def change_split(place: Path) -> list[str]:
    path = refer(place, "refs(unc).p")
    refs = pickle.loads(path.read_bytes())
    used = {row["ref_id"] for row in json.loads(refer(place, "refcoco+_val.json").read_text())}
    next(ref for ref in refs if ref["ref_id"] in used)["split"] = "testA"
    path.write_bytes(pickle.dumps(refs))
    return []


def change_boxes(place: Path) -> list[str]:
    def wider(instances: Any) -> None:
        for row in instances["annotations"]:
            row["bbox"][2] += 1

    return edit_json(refer(place, "instances.json"), wider)


def change_detections(place: Path) -> list[str]:
    return edit_json(refer(place, "dets.json"), lambda dets: [boxes.reverse() for boxes in dets.values()])


def change_vocabulary(place: Path) -> list[str]:
    path = place / "data" / "text_encoder" / "vocab.txt"
    *words, last, end = path.read_text().splitlines()
    path.write_text("\n".join([*words, end, last]) + "\n")
    return []


def image(place: Path) -> Path:
    return place / "data" / "images" / "100000.jpg"


def other_image(place: Path) -> list[str]:
    shutil.copy(image(place).with_name("100001.jpg"), image(place))
    return []


CHANGES: dict[str, tuple[Change, str]] = {
    "trained anew": (
        lambda place: same_size_and_time(place / ONE, (place / "ckpt" / "checkpoint_02.pth").read_bytes()),
        r"checkpoint sha256 \w{12} of .*checkpoint_01\.pth \(asked for now: sha256 \w{12} of .*checkpoint_01\.pth\); "
        r"choose another --output_dir, or delete that file$",
    ),
    "image_res": (lambda _: ["--set", "image_res=96"], r"image_res 48 \(asked for now: 96\)"),
    "heads": (lambda _: ["--set", "vision_heads=4"], r"vision_heads 2 \(asked for now: 4\)"),
    "bert_config": (
        lambda place: edit_json(place / "bert.json", lambda bert: bert.update(layer_norm_eps=1e-6)),
        r"bert_config's layer_norm_eps 1e-12 \(asked for now: 1e-06\)",
    ),
    "vocabulary": (change_vocabulary, "vocabulary sha256"),
    "text": (first_word, r"expressions \d+, sha256 \w{12} \(asked for now"),
    "order": (
        lambda place: edit_json(refer(place, "refcoco+_val.json"), lambda rows: rows.insert(0, rows.pop())),
        "expressions ",
    ),
    "image": (other_image, "images "),
    "image of equal size and time": (
        lambda place: same_size_and_time(image(place), image(place).read_bytes()[:-1] + b"x"),
        "images ",
    ),
    "boxes": (change_boxes, "boxes "),
    "splits": (change_split, "splits "),
    "detections": (change_detections, r"detections \(det_file\) "),
    "pairs": (
        lambda place: edit_json(
            place / "data" / "matching_val.json", lambda rows: [row.update(match=1 - row["match"]) for row in rows]
        ),
        r"pairs \(matching_file\) ",
    ),
    "no pairs": (lambda _: ["--set", "matching_file=[]"], r"pairs \(matching_file\) "),
    "block_num": (lambda _: ["--block_num", "1"], r"block_num 2 \(asked for now: 1\)"),
    "mode": (lambda _: ["--gradcam_mode", "itc", "--block_num", "1"], "gradcam_mode itm .*itc.*, block_num 2 "),
    "precision": (lambda _: ["--precision", "bf16", "--force_precision"], "precision fp32 .*bf16"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_result_of_something_else_is_refused(
    kind: str, own: Path, tmp_path: Path, nothing_computed: Callable[[], None]
) -> None:
    """Before anything is computed, and before the folder's files are overwritten."""
    out = tmp_path / "out"
    evaluate(REFCOCO_PLUS, own, out, *matching(own), checkpoint=ONE)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    change, message = CHANGES[kind]
    words = change(own)
    nothing_computed()
    with pytest.raises(ResultError, match=r"epoch00\.pth is the result of .*" + message):
        evaluate(REFCOCO_PLUS, own, out, *matching(own), *words, checkpoint=ONE)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_of_another_benchmark(place: Path, tmp_path: Path) -> None:
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    for other in (REFCOCO_PLUS, FLICKR):
        with pytest.raises(ResultError, match=rf"benchmark RefCLEF \(asked for now: {re.escape(other.name)}\)"):
            evaluate(other, place, tmp_path, checkpoint=ONE)


def unread_detections(place: Path) -> list[str]:
    return edit_json(refer(place, "dets.json"), lambda dets: dets.update({"77": [[1, 2, 3, 4]]}))


def another_config(place: Path) -> list[str]:
    write_config(place / "other.yaml", {**json.loads((place / "refcoco.yaml").read_text()), "batch_size": 3})
    return ["--config", str(place / "other.yaml")]


def another_bert_file(place: Path) -> list[str]:
    (place / "b.json").write_text(
        json.dumps({**json.loads((place / "bert.json").read_text()), "x": 1, "hidden_dropout_prob": 0.5}, indent=3)
    )
    return ["--set", f"bert_config={place / 'b.json'}"]


def moved_data(place: Path) -> list[str]:
    moved = (place / "data").rename(place / "moved")
    (place / "refcoco.yaml").write_text((place / "refcoco.yaml").read_text().replace(str(place / "data"), str(moved)))
    return ["--text_encoder", str(moved / "text_encoder"), "--set", f"matching_file=[{moved / 'matching_val.json'}]"]


def touched(place: Path) -> list[str]:
    for path in (place / ONE, image(place), refer(place, "dets.json")):
        path.touch()
    return []


SAME: dict[str, Change] = {
    "nothing": lambda _: [],
    "another config": another_config,
    "another bert_config": another_bert_file,
    "moved data": moved_data,
    "touched": touched,
    "detections of other images": unread_detections,
    "--skip_broken": lambda _: ["--skip_broken"],
    "seed": lambda _: ["--seed", "7", "--set", "queue_size=9", "--set", "optimizer.lr=1"],
}


@pytest.mark.parametrize("kind", SAME)
def test_what_decides_nothing_is_no_change(
    kind: str, own: Path, tmp_path: Path, nothing_computed: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(REFCOCO_PLUS, own, tmp_path / "out", *matching(own), checkpoint=ONE)
    lines = log(tmp_path / "out")
    words = SAME[kind](own)
    nothing_computed()
    for _ in range(2):
        evaluate(REFCOCO_PLUS, own, tmp_path / "out", *matching(own), *words, checkpoint=ONE)
        assert "epoch 00: already evaluated, skipped" in capsys.readouterr().out
    assert log(tmp_path / "out") == lines


def test_parts_of_albef_are_those_of_earlier_results(bert_vocab: Path) -> None:
    """A part more, and every result that is stored would be of an unknown origin."""
    found = identity.of_model(load_config("configs/scenes/Grounding_refcoco.yaml", GroundingConfig), str(bert_vocab))
    sizes = {"image_res", "patch_size", "vision_width", "vision_depth", "vision_heads", "vision_mlp_ratio"}
    bert = {key.removeprefix("bert_config's ") for key in found if key.startswith("bert_config's ")}
    assert found.keys() - {f"bert_config's {key}" for key in bert} == sizes | {"embed_dim", "vocabulary", "torch"}
    assert bert == {
        "fusion_layer", "encoder_width", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps",
        "pad_token_id",
    }  # fmt: skip


def test_equal_checkpoints_are_one_wherever_they_lie(
    own: Path, tmp_path: Path, nothing_computed: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(REFCLEF, own, tmp_path / "out", checkpoint=ONE)
    (own / "elsewhere").mkdir()
    shutil.copyfile(own / ONE, own / "elsewhere" / "mine.pth")
    origin = tmp_path / "out" / "result" / "epoch00.json"
    edit_json(origin, lambda record: record.update(torch="1.2"))
    nothing_computed()
    capsys.readouterr()
    evaluate(REFCLEF, own, tmp_path / "out", checkpoint="elsewhere/mine.pth")
    printed = capsys.readouterr().out
    assert re.search(r"of equal content, was .*ckpt/checkpoint_01\.pth and PyTorch was 1\.2\n", printed)
    assert "already evaluated, skipped" in printed
    record = json.loads(origin.read_text())
    assert record["checkpoint"].endswith("elsewhere/mine.pth")
    assert record["torch"] == "1.2"  # the one that computed it


# ---- hashed once


def test_unchanged_files_are_hashed_once(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(files, "file_digest", lambda path: read.append(Path(path).name) or Path(path).name)
    images = {item.image.name for item in REFCLEF.load(load_config(own / "refclef.yaml", GroundingConfig))}
    checkpoints = [f"checkpoint_{epoch:02d}.pth" for epoch in range(3)]
    for expected in ([*images, *checkpoints, "vocab.txt"], ["vocab.txt"]):
        evaluate(REFCLEF, own, tmp_path)
        assert sorted(read) == sorted(expected)
        read.clear()
    touched(own)
    for expected in ([*images, checkpoints[1], "vocab.txt"], ["vocab.txt"]):  # looked at again, once
        evaluate(REFCLEF, own, tmp_path)
        assert sorted(read) == sorted(expected)
        read.clear()


# ---- folders of results


@pytest.mark.parametrize(
    "record", [None, "not json", "[]", '{"checkpoint": "x", "checkpoint_bytes": 5, "block_num": 2}']
)
def test_a_result_of_unknown_origin_is_refused(record: str | None, place: Path, tmp_path: Path) -> None:
    """One of the release, or of a version that did not say enough."""
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    origin = tmp_path / "result" / "epoch00.json"
    origin.unlink() if record is None else origin.write_text(record)
    with pytest.raises(
        ResultError, match=r"epoch00\.pth is of an unknown origin.*; choose another --output_dir, or del"
    ):
        evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    (tmp_path / "result" / "epoch00.pth").unlink()
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)  # as the message says
    results = ResultFolder(tmp_path / "result")
    with pytest.raises(ResultError, match=r"is the result of block_num \d+ \(asked for now: 7\)"):  # of ALBEF, not BLIP
        results.check_origins({"00": {**results.origin("00"), "model": "blip", "block_num": 7}}, False)
    assert len(log(tmp_path)) == 1


def test_a_folder_never_mixes(own: Path, tmp_path: Path, nothing_computed: Callable[[], None]) -> None:
    """Results of other checkpoints, which are not asked for, share the table and config.yaml."""
    evaluate(REFCLEF, own, tmp_path / "out")
    config = (tmp_path / "out" / "config.yaml").read_bytes()
    for name in ("checkpoint_00.pth", "checkpoint_01.pth"):
        (own / "ckpt" / name).unlink()
    (tmp_path / "out" / "result" / "epoch02.pth").unlink()
    nothing_computed()
    wrong = r"epoch00\.pth is the result of image_res 48 .*96\).*; 1 more .* as well; .*or delete the folder .*result$"
    with pytest.raises(ResultError, match=wrong):
        evaluate(REFCLEF, own, tmp_path / "out", "--set", "image_res=96")
    assert (tmp_path / "out" / "config.yaml").read_bytes() == config
    (tmp_path / "out" / "result" / "epoch00.pth").unlink()
    (tmp_path / "out" / "result" / "epoch01.pth").unlink()
    with pytest.raises(ResultError, match="image_res 48"):  # the log has their lines
        evaluate(REFCLEF, own, tmp_path / "out", "--set", "image_res=96")
    assert [line["epoch"] for line in log(tmp_path / "out")] == ["00", "01", "02"]  # as it was


def test_lines_of_a_deleted_result_are_not_taken_for_the_new_ones(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is deleted, computed again, and interrupted before the accuracies are there."""
    out = tmp_path / "out"
    evaluate(REFCLEF, own, out)
    (out / "result" / "epoch01.pth").unlink()
    shutil.copyfile(own / "ckpt" / "checkpoint_00.pth", own / "ckpt" / "checkpoint_01.pth")
    with monkeypatch.context() as patch:
        patch.setattr(program.Evaluation, "accuracies", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(REFCLEF, own, out)
    assert [line["epoch"] for line in log(out)] == ["00", "02"]
    evaluate(REFCLEF, own, out)
    lines = {line.pop("epoch"): line for line in log(out)}
    assert lines["01"] == lines["00"]


def test_what_skip_broken_left_out_is_asked_for(own: Path, tmp_path: Path) -> None:
    image(own).write_bytes(image(own).read_bytes()[:400])
    evaluate(REFCLEF, own, tmp_path / "out", "--skip_broken", checkpoint=ONE)
    with pytest.raises(ResultError, match=r"--skip_broken, \d+ expressions left out \(asked for now: without\)"):
        evaluate(REFCLEF, own, tmp_path / "out", checkpoint=ONE)


def test_run_json_is_of_the_run_that_computed(place: Path, tmp_path: Path) -> None:
    evaluate(REFCLEF, place, tmp_path, "--seed", "5", checkpoint=ONE)
    evaluate(REFCLEF, place, tmp_path, "--seed", "6", checkpoint=ONE)  # computes nothing
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 5


def test_a_checkpoint_replaced_meanwhile(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = program.Evaluation.ask

    def replace(*args: Any) -> Any:
        shutil.copyfile(own / "ckpt" / "checkpoint_02.pth", own / ONE)
        return ask(*args)

    monkeypatch.setattr(program.Evaluation, "ask", replace)
    with pytest.raises(UserError, match=r"checkpoint_01\.pth was replaced while it was evaluated"):
        evaluate(REFCLEF, own, tmp_path / "out", checkpoint=ONE)
    assert not (tmp_path / "out" / "result").exists()


def test_comparing_results_of_other_data(own: Path, tmp_path: Path) -> None:
    evaluate(REFCOCO_PLUS, own, tmp_path / "one", checkpoint=ONE)
    evaluate(
        REFCOCO_PLUS, own, tmp_path / "two", "--block_num", "1", "--compare", str(tmp_path / "one"), checkpoint=ONE
    )
    first_word(own)
    with pytest.raises(ResultError, match=r"one/result/epoch00\.pth cannot be compared: .*expressions"):
        evaluate(REFCOCO_PLUS, own, tmp_path / "three", "--compare", str(tmp_path / "one"), checkpoint=ONE)
    assert not (tmp_path / "three").exists()


def test_rank_0_raises_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ResultError("in the way")

    sent: list[Any] = []
    monkeypatch.setattr(utils, "gather_objects", lambda item: [sent.append(item), item][1:])
    with pytest.raises(ResultError, match="in the way"):
        utils.on_rank_0(fails)
    monkeypatch.setattr(utils, "rank", lambda: 1)
    monkeypatch.setattr(utils, "gather_objects", lambda item: [sent[0], item])
    with pytest.raises(ResultError, match="in the way"):
        utils.on_rank_0(lambda: pytest.fail("is rank 0's alone"))


# ---- not a number


def spoiled(place: Path, key: str, value: float) -> str:
    content = torch.load(place / ONE, weights_only=True)
    content["model"][key].fill_(value)
    torch.save(content, place / "spoiled.pth")
    return str(place / "spoiled.pth")


def test_maps_that_are_not_numbers(own: Path, tmp_path: Path) -> None:
    path = spoiled(own, "text_encoder.bert.encoder.layer.2.output.dense.weight", math.inf)
    expected = r"^the map holds values that are not numbers: in .*spoiled\.pth, text_encoder\..* holds NaN or infinity"
    with pytest.raises(CheckpointError, match=expected):
        evaluate(REFCLEF, own, tmp_path / "out", checkpoint=path)
    assert not (tmp_path / "out" / "result").exists()


def test_maps_of_zeros_are_maps(own: Path, tmp_path: Path) -> None:
    evaluate(REFCLEF, own, tmp_path / "out", checkpoint=spoiled(own, "itm_head.weight", 0.0))
    assert all(row["pred"].eq(0).all() for row in results(tmp_path / "out"))
    assert len(log(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows[3]["pred"].fill_(math.nan),
        lambda rows: rows[3].update(pred=torch.ones(9)),
        lambda rows: rows[3].pop("pred"),
        lambda rows: rows.__setitem__(3, 5),
        None,
    ],
    ids=["nan", "shape", "absent", "no record", "cut"],
)
def test_stored_records_that_are_none(
    spoil: Callable[[Any], object] | None, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    before, rows, path = results(tmp_path), results(tmp_path), tmp_path / "result" / "epoch00.pth"
    if spoil is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        spoil(rows)
        torch.save(rows, path)
    expressions = REFCLEF.load(load_config(place / "refclef.yaml", GroundingConfig))
    with pytest.raises(ReportError, match=r"epoch00\.pth: no result to report"):
        read_maps(Source("x", ResultFolder(tmp_path / "result"), "00"), expressions)
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    assert "cannot be read, perhaps because its run was interrupted" in capsys.readouterr().out
    assert all(torch.equal(a["pred"], b["pred"]) for a, b in zip(before, results(tmp_path), strict=True))
