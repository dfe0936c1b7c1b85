"""What a run tells of itself: rates, waiting, time left, gradients, Weights & Biases; and --grad_clip."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm import tqdm

import Pretrain
import utils
from tests.training_runs import (
    Interruption,
    interrupt,
    log_rows,
    make_workplace,
    ready,
    same_weights,
    saved,
    step_rows,
    train,
)
from training import log as training_log
from training.log import MEASURED, TrainingLog

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace. Do not write into it."""
    return make_workplace(tmp_path_factory.mktemp("told"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


# ---- rates and times


class Clock:
    """What stands for the module `time`: it goes on only where the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(training_log, "time", SimpleNamespace(monotonic=lambda: self.now))

    def passing(self, count: int, seconds: float) -> Any:
        """Batches that each take so long."""
        for number in range(count):
            self.now += seconds
            yield number


def run_epoch(log: TrainingLog, clock: Clock, epoch: int, begin: int = 0, stop: int = 25) -> None:
    """Steps `begin` to `stop` of an epoch of 25: 1 second of waiting, 3 of work; the norm is 50 at step 3."""
    log.begin_epoch(epoch, 25, begin, 25 * epoch)
    batches = log.waiting_for(clock.passing(stop, 1.0))
    for step in log.steps():
        next(batches)
        clock.now += 3
        log.add({"loss_itm": torch.tensor(float(step))})
        log.add_gradient_norm(torch.tensor(50.0 - abs(step - 3)))
        log.end_step(step)
        if step == stop - 1:
            return


def test_rates_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of 25 steps of 8 samples; maps are drawn for 1000 seconds after step 3."""
    clock = Clock(monkeypatch)
    drawn: list[tuple[str, int, dict[str, float]]] = []

    def draw_maps(done: int) -> None:
        clock.now += 1000 if done == 3 else 0

    board: Any = SimpleNamespace(write=lambda *words: drawn.append(words), after_step=draw_maps)
    log = TrainingLog(tmp_path, 50, 8, torch.device("cpu"), board)
    for epoch in (0, 1):
        run_epoch(log, clock, epoch)
        log.end_epoch(0, {})
        clock.now += 500  # a checkpoint is written
    rows = lines(tmp_path)
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 19), (0, 24), (1, 19), (1, 24)]
    for row in rows:
        assert row["samples_per_second"] == row["samples_per_second_per_device"] == 2  # 8 in 4 seconds, without maps
        assert row["data_wait"] == 0.25
        assert 0.05 < row["peak_memory_gb"] < 100
    assert [row["grad_norm"] for row in rows] == [42.9, 31, 42.9, 31]
    assert [row["grad_norm_max"] for row in rows] == [50, 33, 50, 33]
    # The mean of all that has passed, with maps and checkpoints: 1080 seconds for 20 steps, ...
    left = [30 * 1080 / 20, 25 * 1100 / 25, 5 * 1680 / 45, 0]
    assert [row["seconds_left"] for row in rows] == [pytest.approx(value, abs=1e-3) for value in left]
    numbers = {key: value for key, value in rows[0].items() if key not in ("epoch", "step")}
    assert drawn[0] == ("steps", 20, numbers)
    assert drawn[2] == ("epochs", 25, {"loss_itm": 12, "grad_norm": 40.52})


@pytest.mark.parametrize("cut", [1, 7, 20, 22])
def test_an_epoch_that_goes_on_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """At whatever step it was cut; rates are those of the steps that this process has made."""
    clock = Clock(monkeypatch)
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    run_epoch(TrainingLog(tmp_path / "whole", 25, 8, torch.device("cpu")), clock, 0)
    first = TrainingLog(tmp_path / "cut", 25, 8, torch.device("cpu"))
    run_epoch(first, clock, 0, stop=cut)
    state = first.state()
    assert json.loads(json.dumps(state)) == state  # plain values
    second = TrainingLog(tmp_path / "cut", 25, 8, torch.device("cpu"))
    begin = second.begin_epoch

    def go_on(*where: int) -> None:
        begin(*where)
        second.restore([state], 0)
        kept = {"window": second.window, "opening": second.opening, "seconds": second.seconds}
        assert kept == {key: state[key] for key in kept}  # no line tells of these

    monkeypatch.setattr(second, "begin_epoch", go_on)
    run_epoch(second, clock, 0, begin=cut)
    rows, wanted = lines(tmp_path / "cut"), lines(tmp_path / "whole")
    for row, other in zip(rows, wanted, strict=True):
        for name in ("peak_memory_gb", "seconds_left"):
            assert (row.pop(name) > 0) == (other.pop(name) > 0)
    assert rows == wanted


def test_lines_are_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of losses and of waiting, the largest memory; of two real processes: tests/test_distributed.py."""
    clock = Clock(monkeypatch)
    others = iter([({"loss_itm": 1.5, "grad_norm": 19.5}, 0.75, 1000.0), ({"loss_itm": 2.0, "grad_norm": 32}, 0.0, 0)])
    monkeypatch.setattr(utils, "gather_objects", lambda own: [own, next(others)])
    run_epoch(TrainingLog(tmp_path, 25, 8, torch.device("cpu")), clock, 0)
    first, second = lines(tmp_path)
    assert first["loss_itm"] == (9.5 + 1.5) / 2
    assert first["data_wait"] == (0.25 + 0.75) / 2
    assert first["peak_memory_gb"] == 1000
    assert (first["samples_per_second"], first["samples_per_second_per_device"]) == (2, 1)
    assert second["data_wait"] == 0.125


def test_the_bar_begins_with_what_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(training_log, "tqdm", lambda *args, **options: tqdm(*args, **{**options, "disable": False}))
    run_epoch(TrainingLog(tmp_path, 50_000, 8, torch.device("cpu")), clock, 0, stop=20)
    assert "samples/s=2.0, waiting=25%, left=2 days, 7:32:00, loss_itm=9.5, grad_norm=42.9, memory=" in (
        capsys.readouterr().err
    )


# ---- gradients


def gradients(run: Pretrain.Run) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped(place: Path, tmp_path: Path, precision: str) -> None:
    """To the norm that is asked for, of the sum over batches, without the loss scale; else they stay as they are."""
    run = ready(place, tmp_path, "--precision", precision, "--force_precision", "--accum_steps", "2", "batch_size=4")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=precision == "fp16")
    run.parallel.train()
    batches = iter(run.loader)
    for micro in (0, 1):
        run.backward(Pretrain.Batch(*next(batches)).to(run.device), 0.4, micro)
    scale = run.scaler.get_scale()
    assert (scale > 1) == (precision == "fp16")
    before = {name: gradient / scale for name, gradient in gradients(run).items()}
    norm = run.clip_gradients()
    wanted = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in before.values()))
    assert float(norm) == pytest.approx(wanted, rel=1e-5)
    assert same_weights(gradients(run), before)
    run.args.grad_clip, run.scaler = wanted / 4, torch.amp.GradScaler("cpu", enabled=False)
    run.clip_gradients()
    after = gradients(run)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient / 4, rtol=1e-4, atol=1e-12)


def test_the_norm_is_that_before_clipping(place: Path, tmp_path: Path) -> None:
    words = ("--max_steps", "2")
    for name, clip in (("off", ()), ("loose", ("--grad_clip", "1e6")), ("tight", ("--grad_clip", "0.01"))):
        train(place, tmp_path / name, *words, *clip)
    off, loose, tight = (saved(tmp_path / name, 0) for name in ("off", "loose", "tight"))
    assert same_weights(off["model"], loose["model"])
    assert not same_weights(off["model"], tight["model"])
    assert (off["run"]["grad_clip"], tight["run"]["grad_clip"]) == (None, 0.01)
    for name in ("off", "tight"):
        (row,), (epoch,) = step_rows(tmp_path / name), log_rows(tmp_path / name)
        assert 1 < row["grad_norm"] < row["grad_norm_max"]
        assert epoch["train_grad_norm"] == row["grad_norm"]


def test_steps_that_fp16_skips_have_no_norm(place: Path, tmp_path: Path) -> None:
    """With a loss scale that is too large at first, steps are skipped until it is halved often enough."""
    run = ready(place, tmp_path, "--precision", "fp16", "--force_precision")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run.train_epoch(0, 2)
    (row,) = step_rows(tmp_path)
    assert row["loss_itm"] > 0
    assert not {"grad_norm", "grad_norm_max"} & row.keys()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "much"])
def test_the_norm_to_clip_to_is_a_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Pretrain.parse_args(["--grad_clip", text])
    assert "argument --grad_clip: " in capsys.readouterr().err


# ---- Weights & Biases


class StandIn(ModuleType):
    """What stands for the package wandb and its server: it keeps what it is told, a step once, under a run's id."""

    Error, Settings = RuntimeError, dict

    def __init__(self) -> None:
        super().__init__("wandb")
        self.asked: list[dict[str, Any]] = []
        self.runs: dict[str, dict[int, dict[str, float]]] = {}

    def init(self, **options: Any) -> "StandInRun":
        self.asked.append(options)
        run_id = options["id"] or f"run{len(self.runs)}"
        return StandInRun(run_id, self.runs.setdefault(run_id, {}))


class StandInRun:
    def __init__(self, run_id: str, kept: dict[int, dict[str, float]]) -> None:
        self.id, self.kept, self.step, self.ended = run_id, kept, max(kept, default=-1) + 1, False

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= self.step, "wandb warns, and ignores it"
        assert not self.ended
        self.step = step
        self.kept.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(training_log, "INTERVAL", 4)
    return module


def test_what_weights_and_biases_gets(place: Path, tmp_path: Path, wandb: StandIn) -> None:
    """Config and scalars, also of a run that was interrupted: in one run, each step once."""
    words = ("schedular.epochs=2", "--wandb", "amc", "--save_every", "3")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "in step 18", Pretrain.Run, "backward", after=17)
        with pytest.raises(Interruption):
            train(place, tmp_path, *words)
    train(place, tmp_path, *words, "--resume", "auto")
    first, second = wandb.asked
    assert (first["id"], second["id"]) == (None, "run0") == (None, (tmp_path / "wandb" / "run_id").read_text())
    assert {(each["project"], each["resume"], each["dir"]) for each in wandb.asked} == {("amc", "allow", tmp_path)}
    assert first["config"] == second["config"] == saved(tmp_path, 1)["config"]
    assert first["settings"]["console"] == "off"
    wanted: dict[int, dict[str, float]] = {}
    for row in step_rows(tmp_path):
        place_in_run = row.pop("epoch") * 9 + row.pop("step") + 1
        wanted[place_in_run] = {f"steps/{name}": value for name, value in row.items()}
    for row in log_rows(tmp_path):
        means = {name.replace("train_", "epochs/"): row[name] for name in row if name.startswith("train_")}
        wanted[9 * (row["epoch"] + 1)] |= means
    found = wandb.runs["run0"]
    measured = {f"steps/{name}" for name in MEASURED}
    assert [step for step, values in found.items() if measured <= values.keys()] == [4, 8, 9, 13, 17, 18]
    assert {step: {key: values[key] for key in values.keys() - measured} for step, values in found.items()} == wanted
    train(place, tmp_path, *words, "--max_steps", "1")  # from the beginning: another run
    assert [each["id"] for each in wandb.asked] == [None, "run0", None]
    assert (tmp_path / "earlier_1" / "wandb" / "run_id").read_text() == "run0"


def test_without_the_package(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(utils.UserError, match=r"^--wandb: the package is missing \(.*\); pip install wandb$"):
        train(place, tmp_path / "out", "--wandb", "amc")
    assert not (tmp_path / "out").exists()


def test_it_refuses(place: Path, tmp_path: Path, wandb: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(utils.UserError, match=r"^--wandb amc: no API key; WANDB_MODE=offline needs no account$"):
        train(place, tmp_path, "--wandb", "amc")


@pytest.mark.slow
def test_the_package_itself(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: offline, one id over two starts, and the same weights as without it."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for words in (("--max_steps", "3"), ("--max_steps", "12", "--resume", "auto")):  # 9 steps an epoch
        train(place, tmp_path / "plain", *words)
        train(place, tmp_path / "told", *words, "--wandb", "amc")
    run_id = (tmp_path / "told" / "wandb" / "run_id").read_text()
    assert len(list((tmp_path / "told" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))) == 2
    assert same_weights(saved(tmp_path / "plain", 1)["model"], saved(tmp_path / "told", 1)["model"])
    assert step_rows(tmp_path / "plain") == step_rows(tmp_path / "told")
