"""Checkpoints within epochs, in one process: which are kept, what stops a run, what it goes on from, full disks."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import Pretrain
import runs
from dataset.vg import TrainingData
from tests.programs.test_interrupted import assert_equal_runs
from tests.training_runs import log_rows, ready, saved, step_rows, train
from training import saving
from training.state import progress_of
from utils import UserError

EVERY = ("--save_every", "2")  # of nine steps an epoch
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run. Do not write into it."""
    output = tmp_path_factory.mktemp("whole")
    train(place, output, *EVERY, "--keep_last", "99")
    return output


def kept(output: Path) -> list[tuple[int, int]]:
    return [tuple(at) for at in runs.checkpoints(output)]


def when_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Call `action` in the run's step of a number, counted from 0."""
    original, steps = Pretrain.Run.backward, iter(range(10**6))

    def backward(run: Pretrain.Run, *args: Any) -> Any:
        if next(steps) == number:
            action()
        return original(run, *args)

    monkeypatch.setattr(Pretrain.Run, "backward", backward)


def send(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


# ---- signals


@pytest.mark.parametrize(
    ("number", "step", "at"), [(signal.SIGTERM, 8, (1, 0)), (signal.SIGINT, 3, (0, 4)), (signal.SIGTERM, 26, (3, 0))]
)
def test_a_stop_saves_after_the_step(
    number: int, step: int, at: tuple[int, int], place: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        when_step(patch, step, send(number))
        with pytest.raises(SystemExit) as status:
            train(place, tmp_path, "--save_every", "0")
    assert status.value.code == 128 + number
    assert signal.getsignal(number) == before
    path = runs.checkpoint_path(tmp_path, runs.Position(*at))
    assert f"{signal.Signals(number).name}: saved {path}\n  to go on: python " in capsys.readouterr().out
    assert kept(tmp_path)[-1] == at
    train(place, tmp_path, "--save_every", "0", "--resume", "auto")
    assert_equal_runs(tmp_path, whole)


def test_sigusr1_saves_and_goes_on(place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    when_step(monkeypatch, 3, send(signal.SIGUSR1))
    train(place, tmp_path, "--save_every", "0")
    assert kept(tmp_path) == [(0, 4), (1, 0), (2, 0), (3, 0)]
    assert signal.getsignal(signal.SIGUSR1) == before
    assert_equal_runs(tmp_path, whole)


def test_sigusr1_before_training_waits_for_the_first_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Pretrain.build_loader
    monkeypatch.setattr(Pretrain, "build_loader", lambda *args: send(signal.SIGUSR1)() or original(*args))
    train(place, tmp_path, "--save_every", "0", "--max_steps", "3")
    assert kept(tmp_path) == [(0, 1), (1, 0)]


# ---- what is kept, and gone on from


def test_what_is_kept(place: Path, whole: Path, tmp_path: Path) -> None:
    every = [(epoch, step) for epoch in range(3) for step in range(9) if step == 0 or (epoch * 9 + step) % 2 == 0]
    assert kept(whole) == [*every[1:], (3, 0)]
    (tmp_path / runs.BEST).symlink_to("checkpoint_00.pth")
    train(place, tmp_path, *EVERY, "--keep_epochs", "1", "--resume", "auto")
    assert kept(tmp_path) == [(2, 6), (2, 8), (3, 0)]
    assert (tmp_path / "earlier_1" / runs.BEST).is_symlink()  # it was of an earlier run
    shutil.copytree(whole, tmp_path / "best")
    (tmp_path / "best" / runs.BEST).symlink_to("checkpoint_00.pth")
    saving.Saver(tmp_path / "best", 1, 1, saving.Every())._remove_old()
    assert kept(tmp_path / "best") == [(1, 0), (2, 8), (3, 0)]


def test_a_checkpoint_is_due_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 9.0, 10.0, 11.0, 11.0, 20.0, 21.0))  # of the beginning, three questions, a save, two questions
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: next(times)))
    saver = saving.Saver(tmp_path, 1, 1, saving.Every(seconds=10))
    assert [saver.is_due(1) for _ in range(3)] == [False, True, True]
    saver.save(tmp_path / "checkpoint_00_step_000001.pth", {"model": {}})
    assert [saver.is_due(2) for _ in range(2)] == [False, True]
    monkeypatch.setattr("utils.rank", lambda: 1)  # one clock decides
    assert not saver.is_due(2)
    saver.finish()


def test_broken_images_are_counted_on(place: Path, whole: Path, tmp_path: Path) -> None:
    output = copy(whole, tmp_path / "run", (0, 4))
    path = output / "checkpoint_00_step_000004.pth"
    content = torch.load(path, weights_only=True)
    content["progress"]["broken"] = [3, 7]
    torch.save(content, path)
    assert ready(place, output, "--resume", "auto").data.broken_anywhere() == [3, 7]
    other = ready(place, output, "--resume", "auto", "train_file=" + str([str(place / "data" / "train_captions.json")]))
    assert other.data.broken_anywhere() == []  # its entries are others


def test_a_run_that_is_done_stays_as_it_is(place: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir()}
    for more in ([], ["--tensorboard"], ["--max_steps", "5"]):
        train(place, whole, *EVERY, "--resume", "auto", *more)
        said = capsys.readouterr().out
        assert f"nothing is left to train: {whole / 'checkpoint_02.pth'} is the end of this run" in said
        assert "epochs" not in said
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def copy(whole: Path, output: Path, at: tuple[int, int]) -> Path:
    """A run that was killed just after a checkpoint."""
    shutil.copytree(whole, output)
    for other, path in runs.checkpoints(output).items():
        if other > at:
            path.unlink()
    return output


def test_damaged_checkpoints_are_passed_over(
    place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copy(whole, tmp_path / "run", (2, 6))
    damaged = output / "checkpoint_02_step_000006.pth"
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    steps = output / runs.STEPS_LOG
    steps.write_bytes(steps.read_bytes()[:-20])
    train(place, output, *EVERY, "--resume", "auto", "--keep_last", "99")
    said = capsys.readouterr().out
    assert f"warning: {damaged}: not a readable checkpoint" in said
    assert "epochs 2 to 2, fp32, from step 4 of the first" in said
    assert_equal_runs(output, whole)


def test_only_damaged_checkpoints(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint_00.pth").write_bytes(b"cut")
    (row,) = train(place, tmp_path, "--resume", "auto", "--max_steps", "1")
    assert row["epoch"] == 0
    assert (tmp_path / "earlier_1" / "checkpoint_00.pth").read_bytes() == b"cut"
    assert f"{tmp_path / 'checkpoint_00.pth'}: not a readable checkpoint" in capsys.readouterr().out


def test_auto_begins_with_the_given_checkpoint(place: Path, whole: Path, tmp_path: Path) -> None:
    start = str(whole / "checkpoint_02.pth")
    (row,) = train(place, tmp_path, "--checkpoint", start, "--resume", "auto", "--max_steps", "1")
    assert row["epoch"] == 0
    assert saved(tmp_path, 0)["progress"]["epoch"] == 1


def test_fewer_steps_than_were_done(place: Path, whole: Path, tmp_path: Path) -> None:
    output = copy(whole, tmp_path / "run", (1, 5))
    before = log_rows(output)
    train(place, output, "--resume", "auto", "--max_steps", "10")
    assert kept(output)[-1] == (1, 5)
    train(place, output, "--resume", "auto", "--max_steps", "14")  # just that many: the epoch ends
    assert kept(output)[-1] == (2, 0)
    assert [row["steps"] for row in log_rows(output)] == [9, 5]
    assert log_rows(output)[0] == before[0]


# ---- another number of samples a step


@pytest.mark.parametrize(("words", "step"), [(["batch_size=4"], 8), (["batch_size=12"], 3)])
def test_samples_are_neither_repeated_nor_lost(
    words: list[str], step: int, place: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = copy(whole, tmp_path / "run", (0, 4))
    order = list(ready(place, tmp_path / "new").order)
    drawn, original = [], TrainingData.__getitem__
    monkeypatch.setattr(TrainingData, "__getitem__", lambda data, index: drawn.append(index) or original(data, index))
    (row,) = train(place, output, *words, "--resume", "auto", "schedular.epochs=1")
    assert f"from step {step} of the first" in capsys.readouterr().out
    size = int(words[0].partition("=")[2])
    done = step * size  # of the 32 that were; less than a step is left out
    assert drawn == order[done : done + len(drawn)]
    assert len(order) - done - len(drawn) < size
    assert row["steps"] == len(order) // size


def test_of_two_processes_goes_on_alone(place: Path, whole: Path, tmp_path: Path) -> None:
    """Their counts are shared out: the epoch's means are over all that was trained."""
    output = copy(whole, tmp_path / "run", (0, 4))
    path = output / "checkpoint_00_step_000004.pth"
    content = torch.load(path, weights_only=True)
    states = content["progress"]["processes"]
    content["progress"]["processes"] = [states[0], dict(states[0])]
    torch.save(content, path)
    run = ready(place, output, "--resume", "auto")
    run.begin_epoch(0, 9)
    run.state.restore_processes(run.progress, run.start, run.log)
    counted = states[0]["log"]["of_epoch"]
    assert run.log.of_epoch.counts == {name: 2 * count for name, count in counted["counts"].items()}
    means = {name: total / counted["counts"][name] for name, total in counted["sums"].items()}
    assert run.log.of_epoch.means() == pytest.approx(means)


def test_steps_of_another_size_are_no_steps_of_its_own(place: Path, whole: Path, tmp_path: Path) -> None:
    """Counts go on; the random numbers, and the step at which the next line's means begin, are the run's own."""
    run = ready(place, copy(whole, tmp_path / "run", (0, 4)), "--resume", "auto", "batch_size=4")
    run.begin_epoch(0, 19)
    before = torch.get_rng_state()
    run.state.restore_processes(run.progress, run.start, run.log)
    assert run.log.window == run.start.step == 8
    assert torch.equal(torch.get_rng_state(), before)
    assert set(run.log.of_epoch.counts.values()) == {4}


DAMAGE: dict[str, Any] = {
    "a list": [1],
    "no samples": {"samples": None},
    "negative": {"step": -1},
    "processes": {"processes": [3]},
    "entries": {"broken": ["x"]},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_progress_of_another_form(name: str, whole: Path) -> None:
    change, content = DAMAGE[name], saved(whole, 0)
    content["progress"] = change if isinstance(change, list) else content["progress"] | change
    with pytest.raises(UserError, match=r"x\.pth: cannot resume, its 'progress' is damaged"):
        progress_of(content, "x.pth")


@pytest.mark.parametrize("part", ["random", "log"])
@pytest.mark.parametrize("value", [None, {}, {"numpy": [torch.zeros(624), 10**6, 0, 0.0]}, {"of_epoch": {"sums": 3}}])
def test_a_process_state_of_another_form(part: str, value: Any, place: Path, whole: Path, tmp_path: Path) -> None:
    run = ready(place, copy(whole, tmp_path / "run", (0, 4)), "--resume", "auto")
    state = run.progress["processes"][0]
    if part == "random" and value and "numpy" in value:
        value = state["random"] | value
    state[part] = value
    run.begin_epoch(0, 9)
    with pytest.raises(UserError, match="'progress' is damaged"):
        run.state.restore_processes(run.progress, run.start, run.log)


# ---- disks


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may become longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def when_saving(monkeypatch: pytest.MonkeyPatch, numbers: list[int]) -> None:
    """The disk is full at checkpoints of these numbers."""
    original, calls = saving.save_tensors, iter(range(10**6))

    def save(path: Path, content: Any) -> None:
        with full_disk(50_000 if next(calls) in numbers else resource.RLIM_INFINITY):
            original(path, content)

    monkeypatch.setattr(saving, "save_tensors", save)


def test_a_full_disk_does_not_end_a_run(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    when_saving(monkeypatch, [1, 2])
    train(place, tmp_path, *EVERY)
    said = capsys.readouterr().out
    (first, second) = (f"warning: {tmp_path / f'checkpoint_00_step_00000{step}.pth'}: cannot be" for step in (4, 6))
    assert first in said
    assert second in said
    assert f"training goes on; the last checkpoint is {tmp_path / 'checkpoint_00_step_000002.pth'}" in said
    assert said.count("warning") == 2
    assert not list(tmp_path.glob(".*"))
    assert_equal_runs(tmp_path, whole)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_saving(monkeypatch, [1])
    with pytest.raises(UserError, match=r"checkpoint_01\.pth: cannot be written, files may not be that large"):
        train(place, tmp_path, "--save_every", "0", "--max_steps", "18")
    assert kept(tmp_path) == [(1, 0)]


def test_lines_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = runs.Logs(tmp_path)
    logs.append("log.txt", {"epoch": 0})
    with full_disk(20):
        logs.append("log.txt", {"epoch": 1})
        logs.append("log.txt", {"epoch": 2})
        assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n'
        with pytest.raises(UserError, match=r"log\.txt: cannot be written, files may not be that large"):
            logs.finish()
    logs.append("log.txt", {"epoch": 3})
    assert [row["epoch"] for row in runs.read_log(tmp_path / "log.txt")] == [0, 1, 2, 3]
    assert capsys.readouterr().out.count("warning") == 1
    logs.finish()


def test_a_folder_that_is_removed_meanwhile(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    when_step(monkeypatch, 16, lambda: shutil.rmtree(output))
    train(place, output, "--save_every", "0")
    said = capsys.readouterr().out
    assert said.count(f"warning: {output / 'steps.jsonl'}: No such file or directory; check the path") == 1
    assert torch.equal(saved(output, 2)["model"]["temp"], saved(whole, 2)["model"]["temp"])
    assert [row["epoch"] for row in step_rows(output)] == [1, 2]


def test_a_folder_that_is_read_only(place: Path) -> None:
    folder = Path("/sys/kernel")  # even to root
    if not folder.is_dir():
        pytest.skip("no sysfs")
    with pytest.raises(runs.RunError, match="--output_dir /sys/kernel: cannot be written to"):
        train(place, folder)
