"""A new loss on the map: a function in `models.amc.MAP_LOSSES` and its weight are all that it takes."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from tqdm import tqdm

from benchmarks import bench_train
from config import AMCConfig, ConfigError, load_config
from grounding.pictures.panels import loss_figure
from models import amc
from runs import read_runs
from tests.grounding.pictures.test_watch import read_events
from tests.training_runs import log_rows, same_weights, saved, step_rows, train
from training import log as training_log

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHT = "amc.weights.outside=0.5"
SHORT = ("--max_steps", "2")


def outside(cam: Tensor, mask: Tensor, has_box: Tensor, options: AMCConfig) -> Tensor:
    """The part of the map outside the mask, averaged over the samples with a box."""
    part = (cam * (1 - mask)).sum(dim=(1, 2)) / cam.sum(dim=(1, 2)).clamp(min=1e-6)
    return (part * has_box).sum() / has_box.sum().clamp(min=1)


@pytest.fixture
def new_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(amc.MAP_LOSSES, "outside", outside)


@pytest.mark.usefixtures("new_loss")
def test_it_is_logged_shown_and_plotted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_log, "tqdm", lambda *args, **options: tqdm(*args, **{**options, "disable": False}))
    (row,) = train(place, tmp_path, *SHORT, WEIGHT, "--tensorboard")
    assert 0 < row["train_loss_outside"] < 1
    (step,) = step_rows(tmp_path)
    assert step["loss_outside"] == row["train_loss_outside"]
    printed = capsys.readouterr()
    assert f"loss_outside={step['loss_outside']:.3g}" in printed.err  # the bar
    assert f"loss_outside {step['loss_outside']:.4g}" in printed.out  # the epoch's line
    scalars, _ = read_events(tmp_path)
    for group in ("steps", "epochs"):
        assert scalars[f"{group}/loss_outside"] == [(2, pytest.approx(step["loss_outside"]))]
    for by_epoch in (False, True):
        titles = [axes.get_title() for axes in loss_figure(*read_runs([tmp_path], by_epoch)).axes]
        assert titles[:3] == ["loss_mlm", "loss_ita", "loss_itm"]
        assert titles[3:5] == ["loss_cam1: AMC, mean term", "loss_cam2: AMC, max term"]
        assert titles[5].split() == ["loss_outside:", *str(outside.__doc__).removesuffix(".").split()]


def test_it_is_trained_by_its_weight(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(place, tmp_path / "before", *SHORT)
    monkeypatch.setitem(amc.MAP_LOSSES, "outside", outside)
    train(place, tmp_path / "zero", *SHORT, "amc.weights.outside=0")
    train(place, tmp_path / "half", *SHORT, WEIGHT)
    before, zero, half = (saved(tmp_path / name, 0)["model"] for name in ("before", "zero", "half"))
    assert log_rows(tmp_path / "zero")[0]["train_loss_outside"] > 0
    assert same_weights(before, zero)
    assert not same_weights(before, half)


@pytest.mark.slow
@pytest.mark.usefixtures("new_loss")
def test_it_is_benchmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "load_config", lambda path, kind: load_config(path, kind, [WEIGHT]))
    trainer, found = bench_train.Trainer(argparse.Namespace(quick=True, batch=2), tokens=6), []
    for procedure in ("published", "ours"):
        trainer.reset()
        found.append(float(trainer.step(bench_train.Variant(procedure, "fp32"))["loss_outside"]))
    assert 0 < found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.usefixtures("new_loss")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "amc.weights lacks 'outside', a loss on the map: add its weight, or 0 to only log the loss"),
        ([WEIGHT, "amc.weights.outsid=1"], r"amc.weights.outsid: .*MAP_LOSSES; did you mean 'outside'\?$"),
        ([WEIGHT, "amc.weights.zzz=1"], "amc.weights.zzz: there is no such loss in models.amc.MAP_LOSSES$"),
        ([WEIGHT, "amc.weights.cam1=1"], "amc.weights.cam1: the weight of this loss is amc.weight_mean"),
    ],
)
def test_weights_and_losses_must_match(place: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{place / 'config.yaml'}: {message}"):
        train(place, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("new_loss")
def test_without_amc_it_needs_no_weight(place: Path, tmp_path: Path) -> None:
    (row,) = train(place, tmp_path, "add_gcam=False", *SHORT)
    names: dict[str, Any] = {name: row[f"train_loss_{name}"] for name in ("cam1", "cam2", "outside")}
    assert names == {"cam1": 0, "cam2": 0, "outside": 0}
