"""bench_train.py, bench_eval.py and bench_gpu.py: what they count and print, and what becomes of what fails."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_eval, bench_gpu, bench_train, machine
from benchmarks.bench_gpu import Part
from benchmarks.bench_train import Measured, Trainer, Variant
from utils import UserError

CPU = torch.device("cpu")
SMALL = ["--quick", "--batch", "3", "--tokens", "6", "--rounds", "1"]
OURS = Variant("ours", "fp32")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def table(printed: str) -> dict[str, dict[str, str]]:
    """The first table: of each row by its first cell, the cells by their heads."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {cells[0]: dict(zip(heads, cells, strict=True)) for cells in rows if len(cells) == len(heads)}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_all(asked: list[Variant], *args: Any) -> Iterator[Measured | str]:
        return (bench_train.alone(variant, *args) for variant in asked)

    monkeypatch.setattr(bench_train, "measure_all", measure_all)


# ---- the training step


@pytest.mark.usefixtures("in_this_process")
def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    bench_train.main(bench_train.parse_args([*SMALL, "--precisions", "fp32", "--peak_tflops", "0.01"]))
    printed = capsys.readouterr().out
    rows = table(printed)
    assert list(rows) == ["published, fp32", "ours, fp32", "ours, fp32, checkpointing"]
    ours, published = rows["ours, fp32"], rows["published, fp32"]
    assert published["ratio"] == "1.00"
    assert published["losses differ by at most"] == "0.0e+00"
    assert 0 < float(ours["losses differ by at most"]) < 1e-5
    assert int(ours["launches"]) < int(published["launches"])
    assert int(ours["launches"]) < int(rows["ours, fp32, checkpointing"]["launches"])
    assert (ours["waits"], int(published["waits"]) > 0) == ("0", True)
    assert float(ours["images/s"]) == pytest.approx(3 / float(ours["s per step"]), rel=0.05)
    flop = float(printed.split(" TFLOP a step")[0].split()[-1])
    share = 100 * flop / float(ours["s per step"]) / 0.01
    assert float(ours["of the peak"].rstrip("%")) == pytest.approx(share, rel=0.05)


def test_variants() -> None:
    args = bench_train.parse_args(["--precisions", "tf32", "bf16", "--compile"])
    assert [str(variant) for variant in bench_train.variants(args)] == [
        *("published, tf32", "ours, tf32", "ours, bf16", "ours, tf32, compiled", "ours, bf16, compiled"),
        *("ours, tf32, checkpointing", "ours, bf16, checkpointing"),
    ]


@pytest.mark.usefixtures("in_this_process")
def test_a_variant_that_fails_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_rounds(trainer: Trainer, asked: list[Variant], rounds: int) -> dict[Variant, float]:
        return dict.fromkeys(asked, 0.5)

    def step(trainer: Trainer, variant: Variant, times: int = 1) -> dict[str, torch.Tensor]:
        if variant.checkpointing:
            raise RuntimeError("CUDA out of memory" if variant.precision == "fp32" else "no such kernel")
        return {"loss_mlm": torch.tensor(1.0)}

    monkeypatch.setattr(bench_train, "in_rounds", in_rounds)
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(UserError, match=r"^ours, bf16, checkpointing: failed: RuntimeError\('no such kernel'\)$"):
        bench_train.main(bench_train.parse_args(SMALL))
    rows = table(capsys.readouterr().out)
    assert rows["ours, bf16"]["s per step"] == "0.500"
    assert rows["ours, fp32, checkpointing"]["s per step"] == "out of memory"
    assert rows["ours, bf16, checkpointing"]["s per step"] == "failed"


class Deadly:
    """Options that kill the process that reads them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def test_a_process_of_its_own(tmp_path: Path) -> None:
    args: Any = bench_train.parse_args([*SMALL, "--profile", str(tmp_path)])
    args.steps = 1
    (measured,) = bench_train.measure_all([OURS], args, CPU)
    assert isinstance(measured, Measured), measured
    assert 0.1 < measured.memory < 5
    events = json.loads((tmp_path / "train_ours_fp32.json").read_text())["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    deadly: Any = Deadly()
    assert list(bench_train.measure_all([OURS], deadly, CPU)) == ["failed: its process was killed"]


def test_flop_of_a_step_are_those_of_real_tensors() -> None:
    trainer = Trainer(bench_train.parse_args(SMALL), 6)
    real = machine.count_flop(lambda: trainer.model.total(trainer.model(trainer.batch, 0.4)).backward())
    trainer.model.checkpoint_activations()  # what is computed again does not count
    assert trainer.flop() == real > 1e9


# ---- what is counted


def test_flop() -> None:
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert machine.count_flop(lambda: (x @ y).sum().backward()) == 3 * 2 * 3 * 4 * 5
    q = torch.randn(1, 2, 6, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert machine.count_flop(lambda: attention(q, q, q)) == 2 * 2 * 2 * 6 * 6 * 8


def test_share_of_a_known_peak() -> None:
    for name, kind, share in (
        ("NVIDIA H100 80GB HBM3", "bf16", "40.4%"),
        ("NVIDIA H100 PCIe", "bf16", "52.9%"),
        ("NVIDIA A100-SXM4-40GB", "fp32", "2051.3%"),
        ("Tesla V100-SXM2-16GB", "bf16", "-"),
        ("cpu", "fp32", "-"),
    ):
        assert machine.share_of_peak(40e12, 0.1, name, kind, None) == share
    assert machine.share_of_peak(40e12, 0.1, "cpu", "fp32", 1600) == "25.0%"


def test_calls_of_cuda() -> None:
    launches = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"]
    waits = ["cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"]
    others = ["cudaDeviceSynchronize", "cudaMemcpyAsync", "cudaStreamWaitEvent", "aten::mm", "cudaEventRecord"]
    assert machine.launches_and_waits([*launches, *waits, *others]) == (5, 3)


# ---- evaluation


@pytest.mark.parametrize("mix", ["refcoco", "blip"])
def test_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str], mix: str) -> None:
    words = ["--quick", "--mixes", mix, "--rounds", "1", "--images", "2", "--batch", "2"]
    bench_eval.main(bench_eval.parse_args([*words, "--profile", str(tmp_path), "--peak_tflops", "0.01"]))
    printed = capsys.readouterr().out
    rows = table(printed)
    ours, published = rows["ours, fp32"], rows["published, fp32"]
    assert int(ours["same points"].removesuffix("/8")) >= 6  # random weights: flat maps, of which rounding decides
    assert int(ours["same boxes"].removesuffix("/8")) >= 6
    flop = float(printed.split(" GFLOP an image")[0].split()[-1]) / 1000
    share = 100 * flop / 7 / float(ours["s per expression"]) / 0.01
    assert float(ours["of the peak"].rstrip("%")) == pytest.approx(share, rel=0.05)
    assert float(ours["launches"]) < float(published["launches"])
    shares = [line.split("|")[3].strip() for line in printed.splitlines() if line.endswith("% |")]
    assert sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=0.3)
    assert (tmp_path / "eval_96_ours_bf16.json").is_file()


# ---- all at once


def test_a_report_of_what_succeeds_and_what_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = "import sys; print('| half a table |'); sys.exit('the reason')"
    waiting = "import subprocess as s, time; print('begun', s.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    parts = {
        "train": Part("Training", ["-c", "import sys; print('| a table |', sys.argv[1:])"], ["--quick"]),
        "tests": Part("Tests", ["-c", failing], [], takes_device=False),
        "eval": Part("Evaluation", ["-c", waiting], []),
        "data": Part("Loading", ["-c", "import os; print(os.environ['TEST_DEVICE'])"], [], False, False),
    }
    monkeypatch.setattr(bench_gpu, "PARTS", parts)
    args = bench_gpu.parse_args(["--device", "cpu", "--quick", "--limit", "0.05", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"^tests, eval failed; .*report.md and .*logs say why$"):
        bench_gpu.main(args)
    report = (tmp_path / "report.md").read_text()
    for part in (
        f"## Measured on {machine.describe_machine().partition(',')[0]}, 20",
        f"torch {torch.__version__}".split("+")[0],
        "| Tests | 0.0 | exit status 1 |",
        "| Evaluation | 0.1 | not done after 0.05 minutes |",
        "| Loading | 0.0 | done |",
        "| a table | ['--quick', '--device', 'cpu']\n",
        "| half a table |\n\nexit status 1:\n\n```text\nthe reason\n```",
        "begun ",
        "### Loading\n\n```sh\npython -c import os; print(os.environ['TEST_DEVICE'])\n```\n\n```text\ncpu\n```\n",
    ):
        assert part in report
    started = Path("/proc", (tmp_path / "logs" / "eval.txt").read_text().split()[1], "cmdline")
    assert not started.exists() or not started.read_bytes()  # gone, or waiting to be reaped
    assert "report.md: paste it" in capsys.readouterr().out


@pytest.mark.parametrize("program", [bench_gpu, bench_train, bench_eval])
def test_without_a_gpu(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--device cuda: this machine has no CUDA device"):
        program.main(program.parse_args(["--device", "cuda"]))


def test_the_parts_are_commands_that_exist() -> None:
    for part in bench_gpu.PARTS.values():
        assert any((bench_gpu.ROOT / word).is_file() for word in part.words)
    bench_train.parse_args([*bench_gpu.PARTS["train"].quick, "--device", "cuda"])
    bench_eval.parse_args([*bench_gpu.PARTS["eval"].quick, "--device", "cuda"])
