"""Pretrain.py from its arguments to its files: what it leaves, repeats, resumes and refuses, with a tiny model."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import Pretrain
import utils
from config import ConfigError, PretrainConfig, load_config
from dataset.loader.workers import EpochOrder
from dataset.reading import DataError
from dataset.text import load_tokenizer
from dataset.vg import TrainingData
from models import amc
from models.checkpoint import CheckpointError
from models.pretrain import Batch, PretrainModel
from tests.training_runs import (
    KEYS,
    LOSSES,
    REPOSITORY,
    Interruption,
    arguments,
    interrupt,
    left_by_a_run,
    log_rows,
    ready,
    same_weights,
    saved,
    step_rows,
    total,
    train,
)
from training import state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of three epochs with AMC, never interrupted. Do not write into it."""
    output = tmp_path_factory.mktemp("finished")
    train(place, output)
    return output


# ---- what a run leaves


def test_what_a_run_with_amc_leaves(place: Path, finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == left_by_a_run(epochs=3)
    for epoch in range(3):
        checkpoint = saved(finished, epoch)
        assert {"model", "optimizer", "lr_scheduler", "config", "epoch"} <= set(checkpoint)
        assert checkpoint["epoch"] == epoch
    config = load_config(finished / "config.yaml", PretrainConfig)
    assert config == load_config(place / "config.yaml", PretrainConfig)
    assert config == PretrainConfig.model_validate(checkpoint["config"])
    PretrainModel(config).load_state_dict(checkpoint["model"])
    entries = len(json.loads((place / "data" / "train_phrases.json").read_text()))
    rows = log_rows(finished)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert {key for key in row if key.startswith("train_") or key == "epoch"} == {*KEYS, "train_grad_norm"}
        assert (row["steps"], row["broken_images"]) == (entries // 8, 0)
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in LOSSES)
    record = json.loads((finished / "run.json").read_text())
    assert (record["seed"], record["world_size"]) == (42, 1)  # outside a process group, where the release stopped
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["options"]["output_dir"] == str(finished)
    assert not dist.is_initialized()


def test_the_log_of_steps(place: Path, tmp_path: Path) -> None:
    """A line for every 20 steps, and for what is left at an epoch's end: means over those steps."""
    (whole,) = train(place, tmp_path, "batch_size=2", "schedular.epochs=1")
    rows = step_rows(tmp_path)
    ends = [*range(20, whole["steps"], 20), whole["steps"]]
    assert [row["step"] + 1 for row in rows] == ends
    assert {row["epoch"] for row in rows} == {0}
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for name in LOSSES:
        means = [row[name.removeprefix("train_")] for row in rows]
        assert len(set(means)) == len(rows) > 1
        average = sum(length * mean for length, mean in zip(lengths, means, strict=True)) / whole["steps"]
        assert average == pytest.approx(whole[name])


@pytest.mark.parametrize("how", ["add_gcam=False", "phrase_input=False", "entries without boxes"])
def test_nothing_for_amc_to_learn_from(place: Path, tmp_path: Path, how: str) -> None:
    captions = f"train_file=[{place / 'data' / 'train_captions.json'}]"
    (row,) = train(place, tmp_path, "schedular.epochs=1", how if "=" in how else captions)
    assert {key for key in row if key.startswith("train_") or key == "epoch"} == {*KEYS, "train_grad_norm"}
    assert row["train_loss_cam1"] == row["train_loss_cam2"] == 0
    assert min(row["train_loss_mlm"], row["train_loss_ita"], row["train_loss_itm"]) > 0
    assert math.isfinite(total(row))


def test_a_fixed_set_is_learned(place: Path, tmp_path: Path) -> None:
    words = ["schedular.epochs=8", "optimizer.lr=3e-3", "mlm_distill_axis=vocabulary", "mlm_probability=0.4"]
    words += ["queue_size=8", "alpha=0"]  # with a random queue's many keys, the start decides how far the sum can fall
    rows = train(place, tmp_path, *words, "augment={flip_prob: 0, grayscale_prob: 0, jitter_prob: 0}")
    assert rows[-1]["train_loss_mlm"] < 0.8 * rows[0]["train_loss_mlm"]
    assert rows[-1]["train_loss_cam2"] < 0.8 * rows[0]["train_loss_cam2"]
    assert total(rows[-1]) < 0.85 * total(rows[0])


# ---- repeating a run


def test_another_seed_gives_another_run(place: Path, finished: Path, tmp_path: Path) -> None:
    row, *_ = train(place, tmp_path, "--seed", "43", "--max_steps", str(log_rows(finished)[0]["steps"]))
    assert row["steps"] == log_rows(finished)[0]["steps"]
    assert all(row[name] != log_rows(finished)[0][name] for name in LOSSES)
    assert not same_weights(saved(tmp_path, 0)["model"], saved(finished, 0)["model"])


def test_workers_change_nothing(place: Path) -> None:
    config = load_config(place / "config.yaml", PretrainConfig)
    tokenizer = load_tokenizer(str(place / "data" / "text_encoder"))
    batches = []
    for workers in ("0", "2"):
        args = Pretrain.parse_args([*arguments(place, place), "--num_workers", workers])
        data, order = TrainingData(config, seed=1), EpochOrder(24, 1, 0, seed=1)
        loader = Pretrain.build_loader(data, order, tokenizer, config, args)
        for epoch in (0, 1):
            data.epoch = order.epoch = epoch
            batches.append(list(loader))
    alone, helped = batches[:2], batches[2:]
    for epoch in (0, 1):
        assert len(alone[epoch]) == len(helped[epoch]) > 2
        for one, other in zip(alone[epoch], helped[epoch], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(alone[0][0][0], alone[1][0][0])  # the second epoch draws anew, in the workers too


def test_every_epoch_draws_its_own_samples(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []
    original = TrainingData.__getitem__

    def record(data: TrainingData, index: int) -> Any:
        drawn.append((data.epoch, index))
        return original(data, index)

    monkeypatch.setattr(TrainingData, "__getitem__", record)
    rows = train(place, tmp_path, "schedular.epochs=2")
    orders = [[index for epoch, index in drawn if epoch == number] for number in (0, 1)]
    for order in orders:
        assert len(set(order)) == len(order) >= 8 * rows[0]["steps"]  # no entry twice
    assert orders[0] != orders[1]


def test_gradient_checkpointing_changes_no_loss(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctypes = mock.Mock()
    monkeypatch.setattr(utils, "ctypes", ctypes)
    steps = log_rows(finished)[0]["steps"]
    (row,) = train(place, tmp_path, "--grad_checkpointing", "--max_steps", str(steps))
    thresholds = [mock.call(-3, 2**19), mock.call(-1, 2**20)]  # M_MMAP_ and M_TRIM_THRESHOLD of glibc's malloc.h
    assert ctypes.CDLL(None).mallopt.call_args_list == thresholds
    for name in LOSSES:  # dropout is on: the recomputation must repeat it
        assert row[name] == pytest.approx(log_rows(finished)[0][name], rel=1e-4)


def test_compiling_changes_no_loss(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = mock.Mock(side_effect=partial(PretrainModel.compile_step, backend="eager"))
    monkeypatch.setattr(PretrainModel, "compile_step", lambda model: compiled(model))
    bert = json.loads((place / "bert.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # padding draws other numbers
    (tmp_path / "bert.json").write_text(json.dumps(bert | still))
    words = [f"bert_config={tmp_path / 'bert.json'}", "max_tokens=12", "--max_steps", "1"]
    (plain,) = train(place, tmp_path / "plain", *words)
    (row,) = train(place, tmp_path / "compiled", *words, "--compile")
    compiled.assert_called_once()
    for name in LOSSES:
        assert row[name] == pytest.approx(plain[name], rel=1e-4)
    assert saved(tmp_path / "compiled", 0)["model"].keys() == saved(finished, 0)["model"].keys()
    assert "--compile: the first step at each length of captions, padded to 8, 12 tokens" in capsys.readouterr().out


# ---- interruption


def test_a_new_run_sets_an_earlier_one_aside(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("1", "2", "3"):
        (row,) = train(place, tmp_path, "--max_steps", "1", "--seed", seed, "--resume", "False")
        assert row["epoch"] == 0
    assert f"holds an earlier run, which is now in {tmp_path / 'earlier_2'}" in capsys.readouterr().out
    folders = [tmp_path / "earlier_1", tmp_path / "earlier_2", tmp_path]
    for folder in folders:
        assert left_by_a_run(epochs=1) <= {path.name for path in folder.iterdir()}
    logs = [(folder / "log.txt").read_text() for folder in folders]
    assert len(set(logs)) == 3
    assert all(len(text.splitlines()) == 1 for text in logs)


def test_resume_does_not_take_an_earlier_runs_checkpoint(place: Path, finished: Path, tmp_path: Path) -> None:
    """A new run that stops before its first checkpoint leaves none to resume, though the folder had three."""
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "in step 0", Pretrain.Run, "train_epoch", after=0)
        with pytest.raises(Interruption):
            train(place, tmp_path)
    rows = train(place, tmp_path, "--resume", "--max_steps", "1")
    assert [row["epoch"] for row in rows] == [0]


def test_a_checkpoint_to_start_from_replaces_all_others(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one, no other weights are looked for: the release downloads DeiT's first."""
    for name in ("init_image_encoder", "init_text_encoder"):
        monkeypatch.setattr(state, name, None)  # would be called
    start = str(finished / "checkpoint_02.pth")
    train(place, tmp_path, "--checkpoint", start, "--max_steps", "1", "vit_init=nowhere.pth")


@pytest.mark.parametrize(
    ("option", "values", "least"),
    [
        ("--accum_steps", ["0"], 1),
        ("--max_steps", ["0", "-1"], 1),
        ("--num_workers", ["-1"], 0),
        ("--seed", ["-1", str(2**64)], 0),
    ],
)
def test_counts_are_in_range(option: str, values: list[str], least: int, capsys: pytest.CaptureFixture[str]) -> None:
    for value in values:
        with pytest.raises(SystemExit):
            Pretrain.parse_args([option, value])
        assert f"argument {option}: must be at least {least}" in capsys.readouterr().err


def test_resume_without_a_checkpoint(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = train(place, tmp_path / "new", "--resume", "--max_steps", "1")
    assert [row["epoch"] for row in rows] == [0]
    assert f"{tmp_path / 'new'} holds no checkpoint yet, starting from the beginning" in capsys.readouterr().out


def test_resume_from_a_given_checkpoint(place: Path, finished: Path, tmp_path: Path) -> None:
    (row,) = train(place, tmp_path / "on", "--resume", "--checkpoint", str(finished / "checkpoint_01.pth"))
    assert row == log_rows(finished)[2]
    assert same_weights(saved(tmp_path / "on", 2)["model"], saved(finished, 2)["model"])
    assert train(place, tmp_path / "done", "--resume", "--checkpoint", str(finished / "checkpoint_02.pth")) == []
    assert not list((tmp_path / "done").glob("*.pth"))


def test_a_file_of_weights_alone_cannot_be_resumed(place: Path, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": saved(finished, 0)["model"]}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pth: cannot resume, it lacks optimizer, lr_scheduler, epoch"):
        train(place, tmp_path, "--resume", "--checkpoint", str(path))
    assert not (tmp_path / "log.txt").exists()
    (row,) = train(place, tmp_path, "--checkpoint", str(path), "--max_steps", "1")  # but it can be started from
    assert row["epoch"] == 0
    assert steps_taken(saved(tmp_path, 0)) == 1
    moved = saved(tmp_path, 0)["model"]["temp"] - saved(finished, 0)["model"]["temp"]
    assert 0 < abs(float(moved)) <= 1.01 * row["train_lr"]  # AdamW's first step from there


# ---- options


@pytest.mark.parametrize(("most", "epochs"), [(3, 1), (13, 2)])
def test_max_steps(place: Path, tmp_path: Path, most: int, epochs: int) -> None:
    rows = train(place, tmp_path, "--max_steps", str(most))
    assert len(rows) == len(list(tmp_path.glob("checkpoint_*.pth"))) == epochs
    assert sum(row["steps"] for row in rows) == most
    assert steps_taken(saved(tmp_path, epochs - 1)) == most


def steps_taken(checkpoint: dict[str, Any]) -> float:
    """Optimizer steps, by AdamW's own count."""
    (count,) = {float(state["step"]) for state in checkpoint["optimizer"]["state"].values()}
    return count


def test_accumulation_steps_less_often(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = mock.Mock(side_effect=PretrainModel.update_teacher)
    monkeypatch.setattr(PretrainModel, "update_teacher", lambda model: moves(model))
    steps = []
    for count in (1, 2):
        moves.reset_mock()
        output = tmp_path / str(count)
        (row,) = train(place, output, "schedular.epochs=1", "batch_size=4", "--accum_steps", str(count))
        assert moves.call_count == row["steps"] == steps_taken(saved(output, 0))  # once a step, not once a batch
        steps.append(row["steps"])
    assert steps[1] == steps[0] // 2


def test_accumulation_averages_the_gradients(place: Path, tmp_path: Path) -> None:
    run = ready(place, tmp_path, "--accum_steps", "2")
    run.parallel.eval()  # without dropout
    # The bias of the MLM head: MLM alone moves it, and its loss knows nothing of the queues that fill meanwhile.
    bias = dict(run.model.named_parameters())["text_encoder.cls.predictions.bias"]
    batches = [Batch(*batch).to(torch.device("cpu")) for batch, _ in zip(run.loader, range(2), strict=False)]
    halves = []
    for batch in batches:
        run.backward(batch, 0.0, micro=1)
        assert bias.grad is not None
        halves.append(bias.grad.clone())
        run.optimizer.zero_grad()
    for micro, batch in enumerate(batches):
        run.backward(batch, 0.0, micro)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, halves[0] + halves[1])
    run.args.accum_steps = 1
    run.optimizer.zero_grad()
    run.backward(batches[0], 0.0, micro=0)
    torch.testing.assert_close(halves[0], bias.grad / 2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(place: Path, tmp_path: Path, precision: str) -> None:
    (full,) = train(place, tmp_path / "full", "--max_steps", "1")
    (half,) = train(place, tmp_path / "half", "--max_steps", "1", "--precision", precision, "--force_precision")
    for name in LOSSES:
        assert half[name] == pytest.approx(full[name], rel=0.03)
    assert half["train_loss_mlm"] != full["train_loss_mlm"]
    rows = train(place, tmp_path / "half", "--precision", precision, "--force_precision")
    assert all(math.isfinite(total(row)) for row in rows)
    assert rows[-1]["train_loss_mlm"] < half["train_loss_mlm"]
    weights = saved(tmp_path / "full", 0)["model"]
    for key, weight in saved(tmp_path / "half", 2)["model"].items():
        assert weight.dtype == weights[key].dtype
        assert weight.isfinite().all()


def test_the_amc_terms_stay_in_full_precision(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: set[torch.dtype] = set()
    original = amc.gradcam

    def record(attention: Tensor, gradient: Tensor, *args: Any) -> Tensor:
        cam = original(attention, gradient, *args)
        kinds.update((attention.dtype, gradient.dtype, cam.dtype))
        return cam

    monkeypatch.setattr(amc, "gradcam", record)
    train(place, tmp_path, "--precision", "bf16", "--force_precision", "--max_steps", "1")
    assert kinds == {torch.float32}


def test_broken_images_are_replaced_on_request(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((place / "data" / "train_phrases.json").read_text())
    for row in rows:
        (tmp_path / row["image"]).write_bytes((place / "data" / "images" / row["image"]).read_bytes())
    broken = tmp_path / rows[7]["image"]
    broken.write_bytes(broken.read_bytes()[:400])
    entries = sum(row["image"] == broken.name for row in rows)
    words = [f"image_root={tmp_path}", "batch_size=2", "schedular.epochs=1"]  # of 2: nearly all entries are used
    (row,) = train(place, tmp_path / "out", *words, "--skip_broken")
    assert 1 <= row["broken_images"] <= entries
    assert (
        f"{row['broken_images']} unreadable images were replaced by others: {place / 'data'}" in capsys.readouterr().out
    )


# ---- refusals


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["batch_size=25"], DataError, "24 training entries do not fill one step of 25; lower batch_size"),
        (["--accum_steps", "4"], DataError, "24 training entries do not fill one step of 32; lower batch_size"),
        (["amc.layer=0"], ConfigError, r"config\.yaml: amc\.layer is 0; the fusion layers are 1 to 2"),
        (
            ["bert_config={small}"],
            utils.UserError,
            r"vocab\.txt: \d+ word pieces, and bert_config's vocab_size is 50;",
        ),
        (
            ["embed_dim=8", "--checkpoint", "{finished}/checkpoint_02.pth"],
            CheckpointError,
            r"checkpoint_02\.pth: does not fit(.|\n)*vision_proj\.weight is \[16, 32\], the model has \[8, 32\]",
        ),
    ],
)
def test_what_does_not_fit_together(
    words: list[str], error: type[Exception], message: str, place: Path, finished: Path, tmp_path: Path
) -> None:
    small = tmp_path / "bert.json"
    small.write_text(json.dumps(json.loads((place / "bert.json").read_text()) | {"vocab_size": 50}))
    words = [word.format(small=small, finished=finished) for word in words]
    captions = f"train_file=[{place / 'data' / 'train_captions.json'}]"
    with pytest.raises(error, match=message):
        train(place, tmp_path / "out", captions, *words)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_nan_stops_the_run(place: Path, finished: Path, tmp_path: Path) -> None:
    content = saved(finished, 0)
    content["model"]["text_encoder.cls.predictions.bias"].fill_(math.nan)
    torch.save(content, tmp_path / "spoiled.pth")
    with pytest.raises(Pretrain.TrainingError, match=r"^loss_mlm.* became NaN or infinite in epoch 0"):
        train(place, tmp_path / "out", "--checkpoint", str(tmp_path / "spoiled.pth"))
    assert not list((tmp_path / "out").glob("*.pth"))


def test_divergence_stops_the_run(place: Path, tmp_path: Path) -> None:
    # All losses are NaN here, and the similarities that hard negatives are drawn from.
    with pytest.raises(Pretrain.TrainingError, match=r"loss_.* became NaN or infinite in epoch 0"):
        train(place, tmp_path, "optimizer.lr=1e30", "schedular.warmup_lr=1e30")
    assert not list(tmp_path.glob("*.pth"))


def test_an_error_is_one_line_and_status_1(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "Pretrain.py", *arguments(place, tmp_path, "image_ress=8")]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {place / 'config.yaml'}: unknown key 'image_ress'; did you mean 'image_res'?\n"
