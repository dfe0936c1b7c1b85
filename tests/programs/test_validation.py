"""Pretrain.py --validate: numbers equal to the evaluation's, a training that does not change, and best.pth."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from dataset.expressions import Expression
from grounding import evaluate, metrics
from grounding.benchmarks import FLICKR, REFCOCO_PLUS
from grounding.maps import ResizedMap
from grounding.validate import BenchmarkError, Validation
from tests.data_keys import data_keys
from tests.grounding.pictures.test_watch import read_events
from tests.programs.test_interrupted import Launched, same
from tests.small_model import SIZES
from tests.training_runs import (
    Interruption,
    Row,
    interrupt,
    left_by_a_run,
    log_rows,
    ready,
    saved,
    step_rows,
    train,
)
from training.state import random_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SHORT = ("batch_size=24", "--save_every", "1")  # three steps an epoch
METRICS = {"refcoco": ("refcoco+", ("box", "point")), "flickr": ("flickr", ("point",))}


def write_config(place: Path, path: Path, **values: Any) -> Path:
    """An evaluation config of the tiny model, of larger images than its training's."""
    sizes = {"image_res": 80, "vision_width": 32, "embed_dim": 16, "bert_config": str(place / "bert.json")}
    path.write_text(json.dumps(SIZES | sizes | {"block_num": 1, "batch_size": 3} | values))
    return path


@pytest.fixture(scope="module")
def configs(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs of benchmarks, without the key `benchmark`, as the release's are."""
    folder = tmp_path_factory.mktemp("configs")
    return {name: write_config(place, folder / f"{name}.yaml", **data_keys(name, place / "data")) for name in METRICS}


@pytest.fixture(scope="module")
def words(configs: dict[str, Path]) -> list[str]:
    return ["--validate", *map(str, configs.values()), *SHORT]


@pytest.fixture(scope="module")
def validated(place: Path, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation, never interrupted. Do not write into it."""
    output = tmp_path_factory.mktemp("validated")
    train(place, output, *words, "--tensorboard")
    return output


def accuracies(row: Row) -> Row:
    return {key: value for key, value in row.items() if key.startswith("val_")}


def evaluated(place: Path, config: Path, checkpoint: Path, output: Path, *words: str) -> dict[str, list[float]]:
    """The accuracies on val of the evaluation program: epoch -> one a metric."""
    text_encoder = str(place / "data" / "text_encoder")
    line = ["--config", str(config), "--checkpoint", str(checkpoint), "--output_dir", str(output)]
    line += ["--text_encoder", text_encoder, "--device", "cpu", "--num_workers", "0", *words]
    benchmark = {"refcoco": REFCOCO_PLUS, "flickr": FLICKR}[config.stem]
    evaluate.evaluate(benchmark, evaluate.parse_args(benchmark, line))
    found: dict[str, list[float]] = {}
    for text in (output / "result" / "log.txt").read_text().splitlines():
        row = json.loads(text)
        found.setdefault(row["epoch"], []).append(row["val_d"])
    return found


# ---- numbers


@pytest.mark.parametrize("name", METRICS)
def test_the_numbers_are_those_of_the_evaluation(
    place: Path, configs: dict[str, Path], validated: Path, tmp_path: Path, name: str
) -> None:
    """Of every checkpoint in the folder; best.pth is none of its own."""
    found = evaluated(place, configs[name], validated, tmp_path)
    key, names = METRICS[name]
    logged = {f"{row['epoch']:02d}": [row[f"val_{key}_{metric}"] for metric in names] for row in log_rows(validated)}
    assert found == logged
    names = ["val_refcoco+_box", "val_refcoco+_point", "val_flickr_point"]
    assert all(list(accuracies(row)) == names for row in log_rows(validated))


def test_the_maps_are_those_of_the_evaluation(
    place: Path, configs: dict[str, Path], validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a metric that every bit of a map counts for: batches are the same, though val alone is asked for."""

    scored: set[str] = set()

    def share_inside(cam: ResizedMap, expression: Expression) -> float:
        scored.add(expression.split)
        x, y, w, h = (int(value) for value in expression.boxes[0])
        return float(cam.pixels[y : y + h, x : x + w].sum() / cam.pixels.sum())

    monkeypatch.setitem(metrics.METRICS, "point", metrics.Metric(share_inside))
    checkpoint = validated / "checkpoint_02.pth"
    words = ["--validate", *map(str, configs.values()), "--checkpoint", str(checkpoint)]
    run = ready(place, tmp_path / "run", *words)
    assert run.validation
    measured = run.validation.measure()
    assert scored == {"val"}
    for name, (key, _) in METRICS.items():
        (found,) = evaluated(place, configs[name], checkpoint, tmp_path / name).values()
        assert found[-1] == measured[f"val_{key}_point"]
        assert 0 < found[-1] < 1


def test_two_processes_measure_the_same(
    place: Path, configs: dict[str, Path], words: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    line = [*words, "schedular.epochs=1", "batch_size=12", "--num_workers", "1"]
    launched = Launched(place, output, *line, processes=2)
    assert launched.wait(200) == [0, 0], launched.printed.read_text()
    found = evaluated(place, configs["refcoco"], output / "checkpoint_00.pth", tmp_path / "out")
    (row,) = log_rows(output)
    assert found == {"00": [row["val_refcoco+_box"], row["val_refcoco+_point"]]}
    assert launched.printed.read_text().count("val_refcoco+_box") == 1  # one of them speaks


def test_training_does_not_change(place: Path, validated: Path, tmp_path: Path) -> None:
    train(place, tmp_path, *SHORT)
    for epoch in range(3):
        one, other = saved(validated, epoch), saved(tmp_path, epoch)
        assert all(same(one[key], other[key]) for key in one if key != "log")
    within = "checkpoint_02_step_000002.pth"  # with random states
    one, other = (torch.load(folder / within, weights_only=True) for folder in (validated, tmp_path))
    for checkpoint in (one, other):
        for state in checkpoint["progress"]["processes"]:
            assert state["log"].pop("seconds") > 0
    assert all(same(one[key], other[key]) for key in one if key != "log")
    rows = [{key: row[key] for key in row.keys() - accuracies(row).keys()} for row in log_rows(validated)]
    assert rows == log_rows(tmp_path)
    assert step_rows(validated) == step_rows(tmp_path)


def test_measuring_leaves_everything_as_it_was(place: Path, words: list[str], tmp_path: Path) -> None:
    run = ready(place, tmp_path, *words)
    run.model.train()
    run.model.text_encoder.eval()
    before, modes = random_state(run.device), [module.training for module in run.model.modules()]
    state = {key: value.clone() for key, value in run.model.state_dict().items()}
    assert run.validation
    first = run.validation.measure()
    assert same(random_state(run.device), before)
    assert [module.training for module in run.model.modules()] == modes
    assert same(dict(run.model.state_dict()), state)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert run.validation.measure() == first


def test_where_the_numbers_go(validated: Path, place: Path, words: list[str], tmp_path: Path, capsys: Any) -> None:
    rows = log_rows(validated)
    scalars, _ = read_events(validated)
    shown = [value for _, value in scalars["epochs/val_flickr_point"]]
    assert shown == [pytest.approx(row["val_flickr_point"]) for row in rows]
    train(place, tmp_path, *words, "--validate_every", "2")
    second, percentage = log_rows(tmp_path)[1], 100 * rows[1]["val_refcoco+_box"]
    assert [bool(accuracies(row)) for row in log_rows(tmp_path)] == [False, True, False]
    assert accuracies(second) == accuracies(rows[1])
    assert f"epoch 1: val_refcoco+_box {percentage:.2f}%, val_refcoco+_point" in capsys.readouterr().out
    assert os.readlink(tmp_path / runs.BEST) == "checkpoint_01.pth"


def test_a_run_killed_while_it_validates_repeats_it(
    place: Path, words: list[str], validated: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "validation", Validation, "measure", after=1)
        with pytest.raises(Interruption):
            train(place, tmp_path, *words)
    assert [row["epoch"] for row in log_rows(tmp_path)] == [0]
    train(place, tmp_path, *words, "--resume", "auto")
    assert log_rows(tmp_path) == log_rows(validated)
    assert same(saved(tmp_path, 2), saved(validated, 2))
    assert os.readlink(tmp_path / runs.BEST) == os.readlink(validated / runs.BEST)


# ---- best.pth


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Accuracies by which the next epochs are judged, instead of measured ones."""
    values: list[float] = []
    monkeypatch.setattr(Validation, "measure", lambda self: {self.decisive: values.pop(0)})
    yield values
    assert not values


def test_best_is_a_link_to_the_first_of_the_best(
    place: Path, words: list[str], told: list[float], tmp_path: Path
) -> None:
    told += [0.25, 0.5, 0.25, 0.5]
    train(place, tmp_path, *words, "schedular.epochs=4", "--save_every", "0", "--keep_epochs", "1")
    assert os.readlink(tmp_path / runs.BEST) == "checkpoint_01.pth"  # relative: the folder may move
    last = {"checkpoint_00.pth", "checkpoint_02.pth"}
    assert {path.name for path in tmp_path.iterdir()} == (left_by_a_run(epochs=4) | {runs.BEST}) - last


def test_best_follows_what_is_there(place: Path, words: list[str], told: list[float], tmp_path: Path) -> None:
    """A run that goes on from an earlier epoch sets the later best aside; a link that a kill prevented is made."""
    told += [0.25, 0.5, 0.75]
    line = [*words, "--save_every", "0"]
    train(place, tmp_path, *line)
    assert os.readlink(tmp_path / runs.BEST) == "checkpoint_02.pth"
    told += [0.1]
    train(place, tmp_path, *line, "--resume", "--checkpoint", str(tmp_path / "checkpoint_01.pth"))
    assert os.readlink(tmp_path / runs.BEST) == "checkpoint_01.pth"
    assert (tmp_path / "earlier_1" / runs.BEST).resolve() == tmp_path / "earlier_1" / "checkpoint_02.pth"
    (tmp_path / runs.BEST).unlink()
    train(place, tmp_path, *line, "--resume", "auto")
    assert os.readlink(tmp_path / runs.BEST) == "checkpoint_01.pth"


def test_lines_of_no_epoch_are_no_best(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_00.pth").touch()
    rows = [{"val": 0.5, "epoch": 0}, {"val": 0.6}, {"val": 0.7, "epoch": None}, {"val": None, "epoch": 1}]
    runs.link_best(tmp_path, rows, "val")
    assert runs.best_checkpoint(tmp_path) == tmp_path / "checkpoint_00.pth"


def test_a_file_called_best_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoint_00.pth", runs.BEST):
        (tmp_path / name).write_text(name)
    runs.link_best(tmp_path, [{"epoch": 0, "val_own_point": 0.5}], "val_own_point")
    assert (tmp_path / runs.BEST).read_text() == runs.BEST
    assert "best.pth is a file of its own, and stays" in capsys.readouterr().out
    (tmp_path / runs.BEST).unlink()
    runs.link_best(tmp_path, [{"epoch": 0, "val_own_point": 0.5}, {"epoch": 1, "val_own_point": 0.6}], "val_own_point")
    assert os.readlink(tmp_path / runs.BEST) == "checkpoint_00.pth"  # there is no checkpoint_01.pth


# ---- data and configs


def test_own_data_without_a_val_split(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((place / "data" / "images").iterdir()).name
    entries = [{"image": image, "phrase": "a circle", "box": [4, 4, 20, 20], "split": split} for split in ("a/b", "c")]
    (tmp_path / "entries.json").write_text(json.dumps(entries))
    keys = {"benchmark": "own", "image_root": str(place / "data" / "images")}
    one, other = (
        write_config(place, tmp_path / f"{name}.yaml", **keys, test_file=[str(tmp_path / "entries.json")])
        for name in ("mine", "yours")
    )
    run = ready(place, tmp_path / "out", "--validate", str(one), str(other))
    assert run.validation
    assert run.validation.decisive == "val_mine_a_b_point"
    splits = [f"{split}_{metric}" for metric in ("map_box", "point") for split in ("a_b", "c")]
    assert list(run.validation.measure()) == [f"val_{name}_{split}" for name in ("mine", "yours") for split in splits]
    assert "it has no split named val: all of a/b, c, 2 expressions of 1 images" in capsys.readouterr().out
    (tmp_path / "more").mkdir()
    again = shutil.copy(one, tmp_path / "more")
    with pytest.raises(BenchmarkError, match="two are called alike; rename a file"):
        ready(place, tmp_path / "out", "--validate", str(one), str(again))


def test_broken_images_are_left_out(place: Path, configs: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(place / "data" / "images", data)
    keys = json.loads(configs["refcoco"].read_text()) | {"image_root": str(data)}
    config = tmp_path / "refcoco.yaml"
    config.write_text(json.dumps(keys))
    row = json.loads(Path(keys["test_file"][0]).read_text())[0]
    (broken,) = (path for path in data.iterdir() if path.stem == Path(row["image"]).stem)
    broken.write_bytes(broken.read_bytes()[:400])
    words = ["--validate", str(config), "--skip_broken", "--max_steps", "1", *SHORT]
    (logged,) = train(place, tmp_path / "run", *words)
    found = evaluated(place, config, tmp_path / "run" / "checkpoint_00.pth", tmp_path / "out", "--skip_broken")
    assert found == {"00": list(accuracies(logged).values())}
    broken.unlink()
    with pytest.raises(BenchmarkError, match=rf"--validate {config}: (.|\n)*{broken.name}"):
        ready(place, tmp_path / "other", "--validate", str(config))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmrk": "own"}, r"unknown key 'benchmrk'"),
        ({"test_file": [], "refcoco_data": None}, "the config lacks 'benchmark'"),
        ({"benchmark": "coco"}, "benchmark is 'coco', which is none of"),
        ({"det_file": "none.json"}, r"none\.json: no such file|none\.json"),
        ({"block_num": 7}, "7"),
        ({"embed_dim": 8}, r"does not fit(.|\n)*vision_proj\.weight is \[16, 32\], the model has \[8, 32\]"),
    ],
)
def test_a_wrong_config_is_an_error_at_once(
    place: Path, configs: dict[str, Path], tmp_path: Path, change: Row, message: str
) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(json.dumps(json.loads(configs["refcoco"].read_text()) | change))
    with pytest.raises(BenchmarkError, match=rf"--validate {config}: (.|\n)*{message}"):
        train(place, tmp_path / "out", "--validate", str(configs["flickr"]), str(config))
    assert not (tmp_path / "out").exists()
