"""The logs of training runs, and plot_log.py on them."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grounding.runs import RunError, read_runs, run_names


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


STEPS = ({"epoch": 0, "step": 19, "lr": 0.1, "loss_itm": 0.6}, {"epoch": 0, "step": 24, "lr": 0.1, "loss_itm": 0.5})
EPOCH = {"train_lr": 0.1, "train_loss_itm": 0.55, "steps": 25, "seconds": 3.0, "epoch": 0}
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


def test_steps_are_counted_where_all_runs_can(runs: dict[str, Path]) -> None:
    rows, unit = read_runs([runs["both"], runs["epochs"]])
    assert unit == "steps"
    assert rows == {
        "both": list(STEPS),
        "epochs": [{"epoch": 0, "step": 24, "loss_itm": 0.55}, {"epoch": 1, "step": 24, "loss_itm": 0.4}],
    }


def test_else_all_runs_are_drawn_by_epochs(runs: dict[str, Path]) -> None:
    rows, unit = read_runs([runs["both"], runs["released"]])
    assert unit == "epochs"
    assert rows == {
        "both": [{"epoch": 0, "step": 0, "loss_itm": 0.55}],
        "released": [{"epoch": 0, "step": 0, "loss_itm": 0.412}, {"epoch": 1, "step": 0, "loss_itm": 0.3}],
    }


def test_by_epoch_on_request(runs: dict[str, Path]) -> None:
    rows, unit = read_runs([runs["both"]], by_epoch=True)
    assert (rows, unit) == ({"both": [{"epoch": 0, "step": 24, "loss_itm": 0.55}]}, "steps")


def test_a_file_can_be_named(runs: dict[str, Path]) -> None:
    assert read_runs([runs["both"] / "log.txt"])[0] == {"both": [{"epoch": 0, "step": 24, "loss_itm": 0.55}]}
    assert read_runs([runs["both"] / "steps.jsonl"])[0] == {"both": list(STEPS)}


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
    runpy.run_path(str(Path(__file__).parent.parent / "plot_log.py"), run_name="__main__")
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
