"""Runs by SelfEQ's schedule: the relation epoch, what follows it, and going on after an interruption anywhere."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import Pretrain
from config import PretrainConfig
from signals import Stopped
from tests.programs.test_interrupted import assert_equal_runs
from tests.training_runs import Interruption, log_rows, saved, step_rows, train
from training.state import earlier_steps
from utils import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
LOSSES = {"train_loss_similarity", "train_loss_consistency"}


def words(place: Path) -> list[str]:
    """Two steps of the relation epoch, three of each of the others; a checkpoint after each."""
    rates = ["relation_optimizer.lr=2e-3", "relation_schedular.warmup_lr=3e-4", "relation_schedular.warmup_interval=1"]
    return [f"relation_file=[{place}/data/train_relations.json]", *rates, "batch_size=24", "--save_every", "1"]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    train(place, output, *words(place))
    return output


def test_what_a_run_leaves(place: Path, whole: Path) -> None:
    names = {path.name for path in whole.iterdir()} - {f"checkpoint_02_step_{step:06d}.pth" for step in (1, 2)}
    assert names == {
        *("checkpoint_relation_00.pth", "checkpoint_01.pth", "checkpoint_02.pth"),
        *("config.yaml", "run.json", "log.txt", "steps.jsonl"),
    }
    first, *later = log_rows(whole)
    assert [row["steps"] for row in (first, *later)] == [2, 3, 3]
    assert first.keys() - later[0].keys() == LOSSES
    assert all(first[name] > 0 for name in LOSSES)
    assert [row["train_loss_cam1"] for row in (first, *later)] == [0, 0, 0]
    assert first["train_lr"] == pytest.approx(3e-4)  # throughout
    assert later[0]["train_lr"] > 4e-4
    relation = torch.load(whole / "checkpoint_relation_00.pth", weights_only=True)
    for content, steps in ((relation, 2), (saved(whole, 1), 3), (saved(whole, 2), 6)):  # each optimizer's own
        assert {float(state["step"]) for state in content["optimizer"]["state"].values()} == {steps}
    assert [group["lr"] for group in relation["optimizer"]["param_groups"]] == pytest.approx([3e-4, 3e-4])
    rows = [json.loads(line) for line in (whole / "steps.jsonl").read_text().splitlines()]
    left = [row["seconds_left"] for row in rows]
    assert [number == 0 for number in left] == [True, False, True]  # at each phase's end
    config = (whole / "config.yaml").read_text()
    assert "train_relations.json" in config
    assert "train_phrases.json" in config


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, by_signal: bool) -> None:
    """Stop a run in the `call`-th step that it begins, by a signal or as a power cut would."""
    original, calls = Pretrain.Run.backward, itertools.count(1)

    def backward(*args: Any) -> Any:
        if next(calls) == call:
            if not by_signal:
                raise Interruption
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(Pretrain.Run, "backward", backward)


@pytest.mark.parametrize(("call", "by_signal"), [(1, True), (2, False), (2, True), (3, False), (4, True), (8, False)])
def test_an_interrupted_run_equals_a_whole_one(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, by_signal: bool
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, call, by_signal)
        with pytest.raises(Stopped if by_signal else Interruption):
            train(place, tmp_path, *words(place), "--resume", "auto")
    train(place, tmp_path, *words(place), "--resume", "auto")
    assert_equal_runs(tmp_path, whole)
    assert not (by_signal and list(tmp_path.glob("earlier_*")))  # it went on from the step, and repeated none
    if call <= 2:
        name = "checkpoint_relation_00.pth"
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_the_last_step_and_what_follows_it(
    place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(place, tmp_path, *words(place), "--max_steps", "4")
    assert [row["steps"] for row in rows] == [2, 2]
    train(place, tmp_path, *words(place), "--max_steps", "4", "--resume")
    assert "nothing is left to train" in capsys.readouterr().out
    assert log_rows(tmp_path) == rows
    assert step_rows(tmp_path)[0] == step_rows(whole)[0]


def test_what_changed_between_the_phases_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, tmp_path, *words(place), "--max_steps", "2")
    assert "this run differs" not in capsys.readouterr().out
    train(place, tmp_path, *words(place), "alpha=0.3", "--seed", "7", "--max_steps", "3", "--resume")
    said = capsys.readouterr().out.partition("this run differs from the one that it goes on with\n")[2].splitlines()
    assert said[:2] == ["  alpha: 0.4 -> 0.3", "  seed: 42 -> 7"]
    assert not any(line.startswith("  train_file") for line in said)


def test_the_rate_may_follow_its_schedule(place: Path, tmp_path: Path) -> None:
    (row,) = train(place, tmp_path, *words(place), "selfeq.rate=schedule", "--max_steps", "2")
    assert row["train_lr"] == pytest.approx((3e-4 + 3e-4) / 2)  # the time is 0 at the first two
    rows = train(place, tmp_path / "more", *words(place), "batch_size=8", "selfeq.rate=schedule", "--max_steps", "3")
    per_step = (2e-3 - 3e-4) / 20
    assert rows[0]["train_lr"] == pytest.approx(3e-4 + per_step / 3)


def test_beside_amc_in_one_run(place: Path, tmp_path: Path) -> None:
    keys = ["selfeq.weight_similarity=1", "selfeq.weight_consistency=0.5", "batch_size=24", "--max_steps", "3"]
    (row,) = train(place, tmp_path, f"train_file=[{place}/data/train_relations.json]", *keys)
    assert all(row[name] > 0 for name in (*LOSSES, "train_loss_cam1", "train_loss_cam2"))


DAMAGED = [{"epoch": [0], "steps": 2}, {"epoch": 0, "steps": "2"}, 0]


@pytest.mark.parametrize(("log", "steps"), [([{"epoch": 0, "steps": 2}], 2), (DAMAGED, 7), ("x", 7), (None, 7)])
def test_steps_before_a_phase_are_those_of_the_log(log: Any, steps: int) -> None:
    keys = {"relation_file": ["r.json"], "train_file": ["t.json"], "image_root": ""}
    _, later = PretrainConfig.model_validate(keys).phases()
    assert earlier_steps({"log": log}, later, 7) == steps


def test_it_is_not_compiled(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--compile: SelfEQ's losses cannot be compiled"):
        train(place, tmp_path, *words(place), "--compile")
