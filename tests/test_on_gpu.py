"""What only a GPU can show: the published numbers there, training in all precisions, resuming, and two of them.

Skipped without a GPU; `make bench-gpu` runs them on one. TEST_DEVICE=cpu tries the tests themselves.
"""

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import precision
import Pretrain
from config import PretrainConfig, load_config
from grounding.benchmarks import REFCOCO_PLUS
from grounding.evaluate import evaluate, parse_args
from models.checkpoint import load_weights, read_checkpoint
from models.pretrain import Batch, PretrainModel
from optim import create_optimizer
from tests.data_keys import data_keys
from tests.training_runs import REPOSITORY, Row, arguments, log_rows, make_workplace, saved, step_rows, train

NAME = os.environ.get("TEST_DEVICE", "cuda")
GOLDEN = Path(__file__).parent / "golden"
LOSSES = ["loss_mlm", "loss_ita", "loss_itm", "loss_cam1", "loss_cam2"]
# Kernels on a GPU add in an order that changes from run to run: equal to rounding, which AdamW's first steps enlarge.
CLOSE = 2e-3

missing = NAME == "cuda" and not torch.cuda.is_available()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing, reason="needs a GPU")]
on_gpu = pytest.mark.skipif(NAME == "cpu", reason="needs a GPU")


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device(NAME)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny scenes and the config of a tiny model without dropout, whose numbers would depend on the device."""
    folder = make_workplace(tmp_path_factory.mktemp("place"))
    bert = json.loads((folder / "bert.json").read_text())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "bert.json").write_text(json.dumps(bert | off))
    return folder


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    gc.collect()


def rows(place: Path, output: Path, *words: str) -> list[Row]:
    """The losses of a run of two epochs of four steps on the device."""
    train(place, output, "batch_size=16", "schedular.epochs=2", "--device", NAME, *words)
    return log_rows(output)


def losses(row: Row) -> dict[str, float]:
    return {name: row[f"train_{name}"] for name in LOSSES}


# ---- the published numbers


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_golden_maps(
    mode: str, golden_data: Path, golden_checkpoint: Path, golden_text_encoder: Path, tmp_path: Path
) -> None:
    words = ["--checkpoint", str(golden_checkpoint.parent), "--output_dir", str(tmp_path), "--gradcam_mode", mode]
    words += ["--text_encoder", str(golden_text_encoder), "--device", NAME, "--num_workers", "0"]
    for key, value in data_keys("refcoco", golden_data).items():
        words += ["--set", f"{key}={value}"]
    evaluate(REFCOCO_PLUS, parse_args(REFCOCO_PLUS, words))
    name = "refcoco_itc" if mode == "itc" else "refcoco"
    golden, results = np.load(GOLDEN / f"eval_{name}.npz"), torch.load(tmp_path / "result" / "epoch00.pth")
    for record, expected in zip(results, golden["pred"], strict=True):
        pred = record["pred"].numpy()
        np.testing.assert_allclose(pred / pred.max(), expected / expected.max(), rtol=0, atol=2e-3)
    lines = [json.loads(line) for line in (tmp_path / "result" / "log.txt").read_text().splitlines()]
    assert lines == json.loads((GOLDEN / "eval_metrics.json").read_text())[name]


def test_golden_losses(golden_fixture: ModuleType, golden_checkpoint: Path, device: torch.device) -> None:
    """Three steps in fp32: 5 GB."""
    golden = json.loads((GOLDEN / "train.json").read_text(encoding="utf-8"))
    config = load_config(REPOSITORY / "configs" / "Pretrain.yaml", PretrainConfig)
    model = PretrainModel(config)
    load_weights(model, read_checkpoint(golden_checkpoint)["model"], golden_checkpoint)
    model.eval().to(device)
    optimizer = create_optimizer(config.optimizer, model)
    drawn = {name: torch.from_numpy(array) for name, array in golden_fixture.training_batch(1).items()}
    batch = Batch(**drawn, has_box=torch.ones(2, dtype=torch.bool)).to(device)
    with precision.use("fp32", device):
        for truth in golden["three_steps_lr1e-5"]:
            found = model(batch, alpha=0.4)
            model.total(found).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert [found[name].item() for name in LOSSES] == pytest.approx(truth, rel=1e-4)


# ---- training


@pytest.fixture(scope="module")
def on_the_cpu(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return rows(place, tmp_path_factory.mktemp("cpu"), "--device", "cpu", "--precision", "fp32")


@pytest.mark.parametrize(
    "words",
    [
        "fp32",
        "fp32 --grad_checkpointing",
        "bf16 --force_precision",
        *(pytest.param(words, marks=on_gpu) for words in ("fp32 --compile", "tf32", "bf16 --compile", "fp16")),
    ],
)
def test_training_follows_the_cpu(words: str, place: Path, on_the_cpu: list[Row], tmp_path: Path) -> None:
    """The negatives are drawn by the device, so that the losses of matching take another course."""
    name = words.split()[0]
    if name == "tf32" and not precision.has_tf32(torch.device(NAME)):
        pytest.skip("needs a GPU with TF32")
    tolerance = {"fp32": CLOSE, "tf32": 0.02}.get(name, 0.1)
    for found, truth in zip(rows(place, tmp_path, "--precision", *words.split()), on_the_cpu, strict=True):
        known, expected = losses(found), losses(truth)
        assert known.pop("loss_itm") == pytest.approx(expected.pop("loss_itm"), rel=0.3)
        assert known == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_run_goes_on(name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--precision", name, "--force_precision", "--save_every", "3"]
    whole, last = rows(place, tmp_path, *words)[-1], saved(tmp_path, 1)["model"]
    (tmp_path / "checkpoint_01.pth").unlink()
    again = rows(place, tmp_path, *words, "--resume", "auto")[-1]
    assert "from step 2 of the first" in capsys.readouterr().out
    assert losses(again) == pytest.approx(losses(whole), rel=CLOSE if name == "fp32" else 0.02)
    for key, value in saved(tmp_path, 1)["model"].items():
        torch.testing.assert_close(value, last[key], rtol=0.02, atol=2e-3)


@on_gpu
def test_a_step_waits_for_nothing(place: Path, tmp_path: Path, device: torch.device) -> None:
    """CUDA itself raises where the host would wait: forward, backward, clipping, AdamW."""
    args = Pretrain.parse_args(arguments(place, tmp_path, "--device", NAME))
    run = Pretrain.Run(args, load_config(args.config, PretrainConfig, args.set), device)
    batches = [Batch(*batch).to(device) for batch in run.loader]
    try:
        for number, batch in enumerate(batches[:3]):
            torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step makes kernels and moments
            run.backward(batch, alpha=0.4, micro=0)
            run.clip_gradients()
            run.scaler.step(run.optimizer)
            run.optimizer.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2 and NAME == "cuda", reason="needs two GPUs")
def test_two_processes(place: Path, tmp_path: Path, on_the_cpu: list[Row]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = arguments(place, tmp_path / "two", "batch_size=8", "schedular.epochs=2", "--device", NAME)
    words += ["--precision", "fp32"]
    done = subprocess.run(
        [*launcher, "Pretrain.py", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for found, truth in zip(log_rows(tmp_path / "two"), on_the_cpu, strict=True):
        assert all(math.isfinite(value) for value in losses(found).values())
        assert found["train_loss_mlm"] == pytest.approx(truth["train_loss_mlm"], rel=0.3)
    assert step_rows(tmp_path / "two")
