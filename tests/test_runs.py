"""A run's folder: its lock, its temporary files, its logs, and plot_log.py on them."""

import json
import os
import platform
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from runs import EPOCHS_LOG, LOCK, STEPS_LOG, Position, RunError, claim, prepare_output, read_log, read_runs, run_names

ROOT = Path(__file__).parents[1]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


STEPS = ({"epoch": 0, "step": 19, "lr": 0.1, "loss_itm": 0.6}, {"epoch": 0, "step": 24, "lr": 0.1, "loss_itm": 0.5})
EPOCH = {"train_lr": 0.1, "train_loss_itm": 0.55, "steps": 25, "seconds": 3.0, "epoch": 0}
MEAN = {"epoch": 0, "step": 24, "loss_itm": 0.55}
BY_EPOCH = ({"epoch": 0, "step": 0, "loss_itm": 0.412}, {"epoch": 1, "step": 0, "loss_itm": 0.3})
RELEASED = ({"train_lr": "0.00001", "train_loss_itm": "0.412", "epoch": 0}, {"train_loss_itm": "0.3", "epoch": 1})


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Runs with both logs, with log.txt alone, and of the release."""
    write(tmp_path / "a" / "both" / "steps.jsonl", *STEPS)
    write(tmp_path / "a" / "both" / "log.txt", EPOCH)
    write(tmp_path / "a" / "epochs" / "log.txt", EPOCH, {**EPOCH, "epoch": 1, "train_loss_itm": 0.4})
    write(tmp_path / "b" / "released" / "log.txt", *RELEASED)
    return {
        path.name: path for path in (tmp_path / "a" / "both", tmp_path / "a" / "epochs", tmp_path / "b" / "released")
    }


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("files", "by_epoch", "unit", "rows"),
    [
        (
            ["a/both", "a/epochs"],
            False,
            "steps",
            {"both": [*STEPS], "epochs": [MEAN, MEAN | {"epoch": 1, "loss_itm": 0.4}]},
        ),
        # Where not all runs count steps, all are drawn by epochs.
        (["a/both", "b/released"], False, "epochs", {"both": [MEAN | {"step": 0}], "released": [*BY_EPOCH]}),
        (["a/both"], True, "steps", {"both": [MEAN]}),
        (["a/both/log.txt"], False, "steps", {"both": [MEAN]}),
        (["a/both/steps.jsonl"], False, "steps", {"both": [*STEPS]}),
    ],
)
def test_what_is_read_of_runs(
    files: list[str], by_epoch: bool, unit: str, rows: dict[str, Any], tmp_path: Path
) -> None:
    assert read_runs([tmp_path / file for file in files], by_epoch) == (rows, unit)


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert run_names([tmp_path / "x" / "amc", tmp_path / "y" / "amc"]) == {
        "x/amc": tmp_path / "x" / "amc",
        "y/amc": tmp_path / "y" / "amc",
    }
    assert list(run_names([tmp_path / "x" / "amc", tmp_path / "x" / "." / "amc"])) == ["amc"]  # the same run


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (None, "absent: no steps.jsonl or log.txt of a training run"),
        ("steps.jsonl", "half: no log.txt of a training run"),
    ],
)
def test_runs_that_cannot_be_drawn(first: str | None, message: str, runs: dict[str, Path], tmp_path: Path) -> None:
    bad = write(tmp_path / "half" / first, *STEPS).parent if first else tmp_path / "absent"
    with pytest.raises(RunError, match=message):
        read_runs([bad, runs["released"]])


def plot(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plot_log.py", *words])
    runpy.run_path(str(ROOT / "plot_log.py"), run_name="__main__")
    return capsys.readouterr().out


def test_plot_log(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    png, svg = tmp_path / "losses.png", tmp_path / "losses.svg"
    said = plot(capsys, monkeypatch, str(runs["both"]), str(runs["epochs"]), "--output", str(png))
    assert said == f"{png}: both (2 points), epochs (2 points), by steps\n"
    colours = {tuple(colour) for colour in np.asarray(Image.open(png).convert("RGB")).reshape(-1, 3).tolist()}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours  # a line a run, in matplotlib's first two colours
    plot(capsys, monkeypatch, str(runs["released"]), "--output", str(svg))
    first = svg.read_bytes()
    assert b"<svg" in first
    plot(capsys, monkeypatch, str(runs["released"]), "--output", str(svg))
    assert svg.read_bytes() == first
    with pytest.raises(SystemExit, match=r"must end in \.png or \.svg"):
        plot(capsys, monkeypatch, str(runs["both"]), "--output", "losses.gif")
    with pytest.raises(SystemExit, match=r"absent: no steps\.jsonl or log\.txt"):
        plot(capsys, monkeypatch, str(tmp_path / "absent"), "--output", str(png))


# ---- the lock


HOLD = """
import os, sys, time, pathlib, runs
with runs.claim(pathlib.Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_folder_is_claimed_until_its_process_ends(tmp_path: Path) -> None:
    """The children of a process that is killed, such as loader processes, may outlive it."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, folder, "\x1b[2J"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        try:
            owner = rf"run is in use by process {other.pid} on {platform.node()} \(-c .*\?\[2J"  # escapes are shown
            with pytest.raises(RunError, match=owner), claim(folder):
                pytest.fail("was not refused")
            with claim(tmp_path / "other"):
                pass
        finally:
            other.kill()
    assert (folder / LOCK).exists()  # the file alone is no lock
    with claim(folder):
        os.kill(child, signal.SIGKILL)  # it was alive
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


def test_folders_in_which_nothing_is_left_go_again(tmp_path: Path) -> None:
    with claim(tmp_path / "output" / "run"):
        pass
    assert not (tmp_path / "output").exists()
    with claim(tmp_path / "output" / "run"):
        (tmp_path / "output" / "table.md").touch()
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["table.md"]


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("runs.fcntl.lockf", fail)
    with claim(tmp_path):
        assert f"{tmp_path} cannot be locked (No locks available)" in capsys.readouterr().out


def test_an_output_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"--output_dir .*file: cannot be written to \(File exists\)"):
        claim(tmp_path / "file").__enter__()


# ---- temporary files


def test_temporary_files_of_ended_processes_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, parent = platform.node(), os.getppid()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        gone = ended.pid
    dead = [f".checkpoint_01.pth.{gone}@{host}.tmp", f".log.txt.{os.getpid()}@{host}.tmp"]
    dead += [f".old.{parent}@another.host.tmp"]
    alive = [f".x.{parent}@{host}.tmp", f".x.{gone}@another.host.tmp", f".x.1@{host}.tmp", f".x.{10**30}@{host}.tmp"]
    others = [f"checkpoint_01.pth.{gone}.tmp", ".notes.tmp", f".{gone}.tmp", f".x.{gone}.tmpx", "checkpoint_00.pth"]
    (tmp_path / "result").mkdir()
    for name in [*dead, *alive, *others, f"result/{dead[0]}"]:
        (tmp_path / name).write_bytes(b"x" * 2_000_000)
    long_ago = time.time() - 90000
    os.utime(tmp_path / f".old.{parent}@another.host.tmp", (long_ago, long_ago))
    with claim(tmp_path):
        said = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {*alive, *others, "result"}
    assert list((tmp_path / "result").iterdir()) == []
    for name in dead:
        assert f"{tmp_path / name}: removed, 2.0 MB" in said


def test_what_a_killed_process_leaves_is_found(tmp_path: Path) -> None:
    """The name that `atomic_path` gives is one that the sweep knows."""
    code = "import os, sys, utils\nwith utils.atomic_path(sys.argv[1]) as path: path.touch(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.b.pth"], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    utils.sweep(tmp_path)
    assert not left.exists()


# ---- odd logs


ROW = b'{"epoch": 0, "step": 3, "loss_itm": 0.5, "train_loss_itm": 0.5, "steps": 4}'
ODD = {
    "a list": b"[1, 2]",
    "a number": b"7",
    "not UTF-8": b'{"epoch": 1, "x": "\xff\xfe"}',
    "UTF-16": '{"epoch": 1}'.encode("utf-16"),
    "cut": ROW[:-9],
    "a long number": b'{"epoch": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "a nested value": b'{"epoch": [0], "loss_itm": {}}',
}


@pytest.mark.parametrize("name", ODD)
def test_lines_that_are_no_rows_are_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"\xef\xbb\xbf" + ROW + b"\r\n\n" + ODD[name] + b"\n" + ROW)
    assert read_log(path) == [json.loads(ROW)] * 2
    assert read_log(path) == [json.loads(ROW)] * 2
    said = capsys.readouterr().out
    assert said == f"{path}: line 3 is left out: cut off, or no JSON object with the values of this log\n"  # once


@pytest.mark.parametrize(
    "values",
    [
        {"epoch": "abc", "step": 1, "steps": 1},
        {"epoch": None, "step": 1, "steps": 1},
        {"epoch": 10**400, "step": 1, "steps": 1},
        {"epoch": 1, "step": "x", "steps": float("nan")},
        {"epoch": 1, "step": float("inf"), "steps": float("inf")},
        {"epoch": 1, "step": 1, "steps": 1, "loss_itm": "high", "train_loss_itm": None},
    ],
)
@pytest.mark.parametrize("by_epoch", [True, False])
def test_values_that_are_no_numbers(
    by_epoch: bool, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = json.dumps({"loss_itm": 1, "train_loss_itm": 1, **values}).encode()
    for name in ("log.txt", "steps.jsonl"):
        (tmp_path / name).write_bytes(bad + b"\n" + ROW + b"\n" + bad)
    rows, unit = read_runs([tmp_path], by_epoch)
    assert [(row["epoch"], row["step"], row["loss_itm"]) for row in rows[tmp_path.name]] == [(0, 3, 0.5)]
    assert unit == "steps"
    assert "line 1 (and 1 more) is left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["log.txt", "steps.jsonl", "weights.pth"])
def test_a_file_without_rows(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"x": torch.rand(99)}, tmp_path / name)
    with pytest.raises(
        SystemExit, match=r"^error: .*: no steps\.jsonl or log\.txt of a training run with losses in it"
    ):
        plot(capsys, monkeypatch, str(tmp_path / name), "--output", str(tmp_path / "x.png"))


def test_lines_of_what_is_to_come_go(tmp_path: Path) -> None:
    """A line names the last step that it tells of, counted from 0: after four steps, that of step 3 stays."""
    places = [(0, 3), (0, 4), (1, 3)]
    steps, epochs = tmp_path / STEPS_LOG, tmp_path / EPOCHS_LOG
    for start, left in ((Position(1, 4), (3, 1)), (Position(1), (2, 1)), (Position(0, 4), (1, 0))):
        write(steps, *({"epoch": epoch, "step": step} for epoch, step in places))
        write(epochs, {"epoch": 0}, {"epoch": 1})
        prepare_output(tmp_path, start)
        assert (len(read_log(steps)), len(read_log(epochs))) == left
