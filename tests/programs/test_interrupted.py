"""Runs that are killed or asked to end at any moment, and go on: they leave what an uninterrupted run leaves."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import Pretrain
import runs
from tests.launched import Launched
from tests.training_runs import REPOSITORY, arguments, log_rows, saved, step_rows

KILLS = int(os.environ.get("KILLS", 2))  # interruptions of each kind of run; many are worth their time now and then
KINDS = {
    "workers": (1, ["--save_every", "2", "--num_workers", "1"]),
    "accumulation": (1, ["--save_every", "1", "batch_size=4", "--accum_steps", "2"]),
    "two processes": (2, ["--save_every", "2", "batch_size=4", "--num_workers", "1"]),
    "two processes without AMC": (2, ["--save_every", "1", "batch_size=4", "add_gcam=False"]),
}
pytestmark = pytest.mark.slow


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_equal_runs(one: Path, other: Path) -> None:
    assert same(saved(one, 2), saved(other, 2))
    assert log_rows(one) == log_rows(other)
    assert step_rows(one) == step_rows(other)


@pytest.mark.parametrize("kind", KINDS if KILLS > 2 else ["workers", "two processes"])
def test_a_run_goes_on_as_if_nothing_had_happened(place: Path, tmp_path: Path, kind: str) -> None:
    count, words = KINDS[kind]
    begun = time.monotonic()
    whole = Launched(place, tmp_path / "whole", *words, processes=count)
    assert whole.wait() == [0] * count, whole.said()
    usual, draw, left, turn = time.monotonic() - begun, random.Random(kind), KILLS, 0
    while left or turn == 0:
        turn += 1
        output = tmp_path / f"run_{turn}"
        while not output.exists() or saved_epochs(output) < 3:
            launched = Launched(place, output, *words, "--resume", "auto", processes=count)
            if left:
                if draw.random() < 0.8:  # else perhaps before training begins
                    launched.until_saved()
                launched.wait(draw.uniform(0, usual / 4))
                launched.send(signal.SIGTERM if left % 2 else signal.SIGKILL)
                left -= 1
            assert None not in launched.wait(), launched.said()
        launched = Launched(place, output, *words, "--resume", "auto", processes=count)
        assert launched.wait() == [0] * count, launched.said()
        assert "nothing is left to train" in launched.said()
        assert_equal_runs(output, tmp_path / "whole")
        shutil.rmtree(output)


def saved_epochs(output: Path) -> int:
    return max((at.epoch for at in runs.checkpoints(output)), default=0)


# ---- two processes that are asked to end, or fail


TWO = ("batch_size=4", "schedular.epochs=400")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_ends_both(place: Path, tmp_path: Path, number: int) -> None:
    launched = Launched(place, tmp_path / "run", *TWO, "--save_every", "1", processes=2)
    launched.until_saved()
    launched.send(signal.SIGUSR1, to=0)
    launched.send(number, to=1)
    assert launched.wait() == [128 + number] * 2, launched.said()
    newest = runs.newest_checkpoint(tmp_path / "run")
    said = launched.said()
    assert f"{signal.Signals(number).name}: saved {newest}\n  to go on: torchrun --nproc_per_node=2 Pretrain.py" in said
    assert said.rstrip().endswith("--resume auto")
    assert "Traceback" not in said


def on_rank_1(result: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    original = Pretrain.Run.backward

    def backward(run: Pretrain.Run, *args: Any) -> dict[str, torch.Tensor]:
        losses = original(run, *args)
        return result(losses) if os.environ["RANK"] == "1" else losses

    Pretrain.Run.backward = backward  # type: ignore[method-assign]


def out_of_memory() -> None:
    def fail(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    on_rank_1(fail)


def not_finite() -> None:
    on_rank_1(lambda losses: losses | {"loss_itm": torch.tensor(math.nan)})


def ended() -> None:
    on_rank_1(lambda losses: sys.exit(0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (out_of_memory, "error: the GPU is out of memory (2.00 GiB more were asked for)"),
        (not_finite, "error: loss_itm became NaN or infinite in epoch 0"),
        (ended, "SystemExit: 0"),
    ],
)
def test_a_failing_process_ends_both(place: Path, tmp_path: Path, spoil: Callable[[], None], message: str) -> None:
    launched = Launched(place, tmp_path / "run", *TWO, processes=2, spoil=spoil)
    assert launched.wait(60) == [1, 1], launched.said()
    said = launched.said()
    assert message in said
    own = said.index("process 1 of 2 on ")
    assert said.count("process 0 of 2") == 1
    assert own < said.index("process 0 of 2")  # which ends because of it


def test_a_broken_image_ends_both(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data" / "images", tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    launched = Launched(place, tmp_path / "run", *TWO, f"image_root={tmp_path / 'images'}", processes=2)
    assert launched.wait(60) == [1, 1], launched.said()
    assert "of 2 on " in launched.said()
    assert "train_phrases.json: entry" in launched.said()
    assert "Traceback" not in launched.said()


def test_a_killed_process_ends_the_other(place: Path, tmp_path: Path) -> None:
    launched = Launched(place, tmp_path / "run", *TWO, "--save_every", "1", processes=2)
    launched.until_saved()
    launched.send(signal.SIGKILL, to=1)
    assert launched.wait(60) == [1, -signal.SIGKILL]
    said = launched.said()
    assert "process 0 of 2" in said
    assert "lost the connection to another one, which was killed or failed" in said
    assert "--resume auto goes on from the last checkpoint" in said


# ---- torchrun


KILLED_ONCE = """
import os, signal
import Pretrain, utils
original, calls = Pretrain.Run.backward, 0

def backward(*args):
    global calls
    calls += 1
    if calls == 13 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

Pretrain.Run.backward = backward
utils.run(Pretrain.main, Pretrain.parse_args())
"""


def test_torchrun_starts_again(place: Path, tmp_path: Path) -> None:
    words = ["batch_size=4", "--save_every", "2"]
    whole = Launched(place, tmp_path / "whole", *words, processes=2)
    (tmp_path / "train.py").write_text(KILLED_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    command += [str(tmp_path / "train.py"), *arguments(place, tmp_path / "run", *words, "--resume", "auto")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert whole.wait() == [0, 0], whole.said()
    assert "epochs 1 to 2, fp32, from step" in done.stdout
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")
