"""What a resumed run uses, says and refuses; which checkpoint it goes on from; what a run that diverges leaves."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import Pretrain
import runs
from config import load_config
from optim import create_optimizer
from scheduler import create_scheduler
from tests.training_runs import log_rows, ready, same_weights, saved, step_rows, train
from utils import UserError

Change = Callable[[dict[str, Any]], object]
SHORT = ("batch_size=24",)  # three steps an epoch
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def begun(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of three epochs, three steps each. Do not write into it."""
    output = tmp_path_factory.mktemp("begun")
    train(place, output, *SHORT, "--max_steps", "6")
    return output


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A copy of `begun` to go on in."""
    output = tmp_path / "run"
    output.mkdir()
    for path in begun.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    return output


def changed(path: Path, change: Change) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def epochs(folder: Path) -> list[int]:
    """The epochs whose ends have a checkpoint."""
    return [at.epoch - 1 for at in runs.checkpoints(folder)]


def resumed(place: Path, output: Path, *words: str) -> Pretrain.Run:
    """A run that is ready to go on."""
    return ready(place, output, *SHORT, "--resume", *words)


# ---- what it uses


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=1e-6", "schedular.warmup_lr=1e-7", "schedular.min_lr=1e-7"],
        ["schedular.epochs=5"],
        ["schedular.sched=step", "schedular.decay_rate=0.5"],
        ["optimizer.weight_decay=0.3", "schedular.warmup_epochs=0"],
    ],
)
def test_rates_and_schedule_are_the_configs(place: Path, run: Path, words: list[str]) -> None:
    going_on = resumed(place, run, *words)
    optimizer = create_optimizer(going_on.config.optimizer, going_on.model)
    schedule = create_scheduler(going_on.config.schedular, optimizer)
    for time in (0, 2, 3.5, 4):
        going_on.schedule.step(time)
        schedule.step(time)
        assert going_on.optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert going_on.schedule.state_dict() == schedule.state_dict()


def test_moments_and_position_are_the_checkpoints(place: Path, run: Path) -> None:
    before = saved(run, 1)["optimizer"]["state"]
    going_on = resumed(place, run, "optimizer.lr=1e-6")
    assert going_on.start == (2, 0)
    state = going_on.optimizer.state_dict()["state"]
    assert state.keys() == before.keys()
    for number, kept in before.items():
        assert all(torch.equal(state[number][name], value) for name, value in kept.items())
        assert float(kept["step"]) == 6


def test_nothing_of_the_file_is_kept(place: Path, run: Path) -> None:
    """A file can be overwritten while the run goes on; a mapping of it would end in a bus error."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    path = run / "checkpoint_01.pth"
    content = torch.load(path, weights_only=True, mmap=True)
    assert str(path) in maps.read_text()
    del content
    going_on = resumed(place, run)
    assert str(path) not in maps.read_text()
    assert going_on.optimizer.state


def test_steps_counted_in_integers(place: Path, run: Path) -> None:
    """As PyTorch wrote them when the release was trained."""

    def change(content: dict[str, Any]) -> None:
        for state in content["optimizer"]["state"].values():
            state["step"] = int(state["step"])
        for group in content["optimizer"]["param_groups"]:
            for key in ("fused", "foreach", "capturable", "differentiable", "maximize", "decoupled_weight_decay"):
                group.pop(key, None)

    changed(run / "checkpoint_01.pth", change)
    train(place, run, *SHORT, "--resume")
    assert {float(state["step"]) for state in saved(run, 2)["optimizer"]["state"].values()} == {9}


# ---- what it says


def test_without_a_change_nothing_is_said(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resumed(place, run)
    said = capsys.readouterr().out
    assert "->" not in said
    assert "differs" not in said


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["optimizer.lr=1e-6"], ["optimizer.lr: 0.001 -> 1e-06"]),
        (["schedular.epochs=5", "amc.layer=2"], ["schedular.epochs: 3 -> 5", "amc.layer: 1 -> 2"]),
        (["batch_size=12"], ["batch_size: 24 -> 12"]),
        (["--seed", "7"], ["seed: 42 -> 7"]),
        (["--accum_steps", "2"], ["accum_steps: 1 -> 2"]),
        (["--precision", "bf16", "--force_precision"], ['precision: "fp32" -> "bf16"']),
        (["vit_init=x.pth"], ['vit_init: null -> "x.pth"']),
    ],
)
def test_changes_are_listed(
    place: Path, run: Path, words: list[str], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    resumed(place, run, *words)
    said = capsys.readouterr().out
    assert [line.strip() for line in said.splitlines() if "->" in line] == lines


def test_what_the_command_line_does_not_say_is_listed_too(begun: Path) -> None:
    content, config = saved(begun, 1), load_config(begun / "config.yaml", Pretrain.PretrainConfig)
    assert runs.changes_since(content, config, content["run"] | {"world_size": 8, "entries": 9}) == [
        "world_size: 1 -> 8",
        f"entries: {content['run']['entries']} -> 9",
    ]
    values = config.model_dump(mode="json")
    values["optimizer"] = {"opt": "adamW", "lr": "1e-3"}  # YAML 1.1 reads it so; weight_decay is the default
    assert runs.changes_since({"config": values, "run": {}}, config, {}) == []


@pytest.mark.parametrize("config", [None, [1], {}, {"optimizer": 3}, {"\x1b[2J": 1, 5: {"x": 2}}])
def test_what_a_checkpoint_does_not_say(config: Any, begun: Path) -> None:
    """The release's have a config and no settings; others have less."""
    ours = load_config(begun / "config.yaml", Pretrain.PretrainConfig)
    content = {"config": ours.model_dump(mode="json") if config is None else config}
    (unknown,) = runs.changes_since(content, ours, {"seed": 1, "precision": "fp32"})
    assert unknown.startswith("the checkpoint does not say its ")
    assert unknown.endswith("seed, precision")
    assert ("batch_size" in unknown) == (config is not None)


# ---- what it refuses


@pytest.mark.parametrize("kind", ["sgd", "lamb"])
def test_any_optimizer_can_be_resumed(place: Path, tmp_path: Path, kind: str) -> None:
    words = ["batch_size=72", f"optimizer.opt={kind}"]  # one step an epoch
    train(place, tmp_path / "whole", *words, "--max_steps", "2")
    train(place, tmp_path / "parts", *words, "--max_steps", "1")
    train(place, tmp_path / "parts", *words, "--max_steps", "2", "--resume")
    assert same_weights(saved(tmp_path / "parts", 1)["model"], saved(tmp_path / "whole", 1)["model"])
    with pytest.raises(UserError, match=r"checkpoint_01\.pth: its optimizer state does not fit adamW .*exp_avg"):
        resumed(place, tmp_path / "parts")


STATES: dict[str, tuple[Change, str]] = {  # changes of a checkpoint's optimizer state
    "a list": (lambda content: content.update(optimizer=[1]), "is of type list"),
    "no state": (lambda content: content["optimizer"].pop("state"), "parameter groups of no parameters"),
    "groups that are none": (
        lambda content: content["optimizer"].update(param_groups=[1, {"params": [[]]}]),
        "parameter groups of no parameters",
    ),
    "a group less": (lambda content: content["optimizer"]["param_groups"].pop(), r"parameter groups of \[\d+\] "),
    "a parameter less": (
        lambda content: content["optimizer"]["param_groups"][1]["params"].pop(),
        r"parameter groups of \[\d+, \d+\] parameters, this model's are of \[\d+, \d+\]",
    ),
    "no dict": (lambda content: content["optimizer"]["state"].update({3: [1]}), "it keeps list where"),
    "a moment less": (
        lambda content: content["optimizer"]["state"][3].pop("exp_avg_sq"),
        r"it keeps \['exp_avg', 'step'\] where \['exp_avg', 'exp_avg_sq', 'step'\] belongs",
    ),
    "another shape": (
        lambda content: content["optimizer"]["state"][3].update(exp_avg=torch.zeros(7)),
        r"exp_avg is of shape \[7\], its parameter of \[",
    ),
    "no number": (lambda content: content["optimizer"]["state"][3].update(step="six"), "step is no tensor"),
    "sparse": (
        lambda content: content["optimizer"]["state"][3].update(exp_avg=torch.eye(3).to_sparse()),
        "exp_avg is no tensor",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_an_optimizer_state_that_does_not_fit(name: str, place: Path, run: Path) -> None:
    change, message = STATES[name]
    changed(run / "checkpoint_01.pth", change)
    with pytest.raises(UserError, match=r"checkpoint_01\.pth: (cannot resume, )?its '?optimizer'? .*" + message):
        resumed(place, run)
    assert len(log_rows(run)) == 2  # the folder is as it was


def test_parameters_without_a_state_are_said(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(run / "checkpoint_01.pth", lambda content: content["optimizer"]["state"].clear())
    resumed(place, run)
    assert re.search(r"(\d+) of \1 parameters have no optimizer state there", capsys.readouterr().out)


def test_a_loss_scale_that_is_none(place: Path, run: Path) -> None:
    changed(run / "checkpoint_01.pth", lambda content: content.update(scaler={"x": 1}))
    with pytest.raises(UserError, match=r"checkpoint_01\.pth: its 'scaler' is no loss scale"):
        resumed(place, run, "--precision", "fp16", "--force_precision")


# ---- from which checkpoint


def test_the_newest_checkpoint_is_by_its_number(tmp_path: Path) -> None:
    assert runs.newest_checkpoint(tmp_path) is None
    assert runs.newest_checkpoint(tmp_path / "absent") is None
    others = ["best", "last", "99_copy", "-1", "1e9", "relations_00", "٣", "", "00.pth.bak"]
    for name in (*others, "9", "02", "99", "100", "relation_00"):  # the last is of SelfEQ's first epoch
        (tmp_path / f"checkpoint_{name}.pth").touch()
    for name in ("._checkpoint_101.pth", ".checkpoint_102.pth", "checkpoint_103.pth.tmp", "Checkpoint_104.pth"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoint_105.pth").mkdir()
    assert epochs(tmp_path) == [0, 2, 9, 99, 100]
    assert runs.newest_checkpoint(tmp_path) == tmp_path / "checkpoint_100.pth"


def test_going_on_from_an_earlier_epoch_sets_later_ones_aside(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A later --resume would take them for the newest of the new branch. A user's own copies stay."""
    (run / "checkpoint_best.pth").write_bytes((run / "checkpoint_00.pth").read_bytes())
    resumed(place, run, "--checkpoint", str(run / "checkpoint_00.pth"))
    assert [path.name for path in sorted(run.glob("*.pth"))] == ["checkpoint_00.pth", "checkpoint_best.pth"]
    assert epochs(run / "earlier_1") == [1]
    assert f"epoch 1 and later, which are now in {run / 'earlier_1'}" in capsys.readouterr().out
    assert [row["epoch"] for row in log_rows(run)] == [0]


@pytest.mark.parametrize(
    ("taken", "next_number"), [(["2"], 3), (["1", "3"], 4), (["x", "7b"], 1), (["9", "10"], 11), ([], 1)]
)
def test_the_next_free_number(taken: list[str], next_number: int, tmp_path: Path) -> None:
    for name in taken:
        (tmp_path / f"earlier_{name}").mkdir()
    (tmp_path / "log.txt").write_text("{}\n")
    runs.prepare_output(tmp_path, runs.BEGINNING)
    assert (tmp_path / f"earlier_{next_number}" / "log.txt").read_text() == "{}\n"


# ---- a run that diverges


@pytest.mark.parametrize("rate", ["1e30", "1e12", "1e8"])
def test_weights_that_diverged_are_not_saved(place: Path, tmp_path: Path, rate: str) -> None:
    """The loss of an epoch's last step is finite: it was of the weights before."""
    words = ["batch_size=72", f"optimizer.lr={rate}", f"schedular.warmup_lr={rate}"]  # one step an epoch
    with pytest.raises(Pretrain.TrainingError, match=r"the weights diverged in epoch 0 \(.*holds no sound checkpoint"):
        train(place, tmp_path, *words)
    assert not list(tmp_path.glob("*.pth"))
    assert log_rows(tmp_path) == []


def test_moments_that_diverged_are_not_saved(place: Path, run: Path) -> None:
    going_on = resumed(place, run)
    next(iter(going_on.optimizer.state.values()))["exp_avg_sq"].fill_(math.inf)
    with pytest.raises(Pretrain.TrainingError, match=r"exp_avg_sq of parameter \d+ .*checkpoint_01\.pth is intact"):
        going_on.check_weights(2)
    assert epochs(run) == [0, 1]


def test_the_programs_advice_works(place: Path, run: Path) -> None:
    with pytest.raises(Pretrain.TrainingError, match=r"checkpoint_01\.pth is intact") as stopped:
        train(place, run, *SHORT, "--resume", "schedular.min_lr=1e30", "schedular.interval=iteration")
    assert epochs(run) == [0, 1]
    advice = re.findall(r"--resume|--checkpoint \S+", str(stopped.value))
    assert advice == ["--resume", f"--checkpoint {run / 'checkpoint_01.pth'}"]
    rows = train(place, run, *SHORT, *" ".join(advice).split(), "optimizer.lr=1e-5")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[2]["train_lr"] < 1e-4


@pytest.mark.parametrize(("step", "intact"), [(0, 0), (1, 1)])
def test_intact_is_what_gave_a_finite_loss(
    step: int, intact: int, place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss of an epoch is of the last checkpoint's own weights."""
    original, steps = Pretrain.Run.backward, iter(range(9))

    def spoil(*args: Any) -> dict[str, torch.Tensor]:
        losses = original(*args)
        return {**losses, "loss_mlm": torch.tensor(math.nan)} if next(steps) == step else losses

    monkeypatch.setattr(Pretrain.Run, "backward", lambda *args: spoil(*args))
    message = rf"in epoch 2, at or shortly before step .*checkpoint_0{intact}\.pth is intact"
    with pytest.raises(Pretrain.TrainingError, match=message):
        train(place, run, *SHORT, "--resume")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, -1e7])
def test_intact_is_not_said_of_what_an_earlier_version_saved(value: float, run: Path) -> None:
    changed(run / "checkpoint_01.pth", lambda content: content["model"]["temp"].fill_(value))
    assert Pretrain.way_back(run, runs.Position(2), True).startswith(f"{run / 'checkpoint_00.pth'} is intact")
    (run / "checkpoint_00.pth").write_bytes(b"cut off")
    assert "is intact" not in Pretrain.way_back(run, runs.Position(2), True)


# ---- a log that a crash cut


@pytest.mark.parametrize("cut", [1, 2, 30, 200])
@pytest.mark.parametrize("older", [False, True], ids=["", "of a checkpoint without a log"])
def test_a_line_that_was_cut_is_restored(
    older: bool, cut: int, place: Path, run: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if older:
        changed(run / "checkpoint_01.pth", lambda content: content.pop("log"))
    for name in ("log.txt", "steps.jsonl"):
        (run / name).write_bytes((run / name).read_bytes()[:-cut])
    resumed(place, run)
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    whole = [json.loads(line) for line in (begun / "log.txt").read_text().splitlines()]
    if cut > 1:  # more than the line's end
        assert f"{run / 'log.txt'}: line 2 is left out: cut off" in said
        assert f"{run / 'steps.jsonl'}: line 2 is left out: cut off" in said
        assert ("the line of epoch 1 was lost; restored from the checkpoint" in said) == (not older)
        del whole[1]["seconds"]
    assert rows == (whole[:1] if older and cut > 1 else whole)
    assert [row["epoch"] for row in step_rows(run)] == ([0] if cut > 1 else [0, 1])


def test_equal_runs_keep_equal_logs_in_their_checkpoints(place: Path, run: Path, begun: Path) -> None:
    assert saved(begun, 1)["log"] == log_rows(begun)
    assert [row["epoch"] for row in saved(begun, 0)["log"]] == [0]
    assert "seconds" not in json.dumps(saved(begun, 1)["log"])
