"""Runs that are killed or asked to end at any moment, and go on: they leave what an uninterrupted run leaves."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import Pretrain
import utils
from tests.training_runs import arguments, log_rows, saved, step_rows

KILLS = int(os.environ.get("KILLS", 6))  # interrupted runs of each kind; more are worth their time now and then
SERVER = multiprocessing.get_context("forkserver")  # its children have imported everything
SERVER.set_forkserver_preload(["Pretrain", "tests.programs.test_interrupted"])
pytestmark = pytest.mark.slow


def program(words: list[str], environment: dict[str, str], printed: Path) -> None:
    """Run Pretrain.py; in a process of its own."""
    os.environ.update(environment)
    sys.argv = ["Pretrain.py", *words]
    with printed.open("a") as sys.stdout, printed.open("a") as sys.stderr:
        torch.set_num_threads(1)
        utils.run(Pretrain.main, Pretrain.parse_args(words))


class Launched:
    """Processes of one run."""

    def __init__(self, place: Path, output: Path, *words: str, processes: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        self.printed = output.with_suffix(".printed")
        self.printed.write_text("")
        line = arguments(place, output, *words)
        self.processes: list[BaseProcess] = []
        for rank in range(processes):
            environment = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            self.processes.append(SERVER.Process(target=program, args=(line, environment, self.printed)))
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> list[int | None]:
        """The exit statuses once all have ended; None for one that has not after `seconds`."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def until(self, output: Path, pattern: str) -> None:
        """Wait until a file of a name is there."""
        end = time.monotonic() + 120
        while not list(output.glob(pattern)):
            assert time.monotonic() < end, self.printed.read_text()
            time.sleep(0.01)


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


ONE = ("--save_every", "2")
TWO = ("--save_every", "2", "batch_size=4", "--num_workers", "1")
KINDS = {1: ONE, 2: TWO}


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(
    request: pytest.FixtureRequest, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """The number of processes, and the folder of a whole run. Do not write into it."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    launched = Launched(place, output, *KINDS[request.param], processes=request.param)
    assert launched.wait(300) == [0] * request.param, launched.printed.read_text()
    return request.param, output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_goes_on_as_if_nothing_had_happened(
    place: Path, uninterrupted: tuple[int, Path], tmp_path: Path, number: int
) -> None:
    count, whole = uninterrupted
    draw = random.Random(count * number)
    output = tmp_path / "run"
    for _ in range(KILLS):
        launched = Launched(place, output, *KINDS[count], "--resume", "auto", processes=count)
        launched.wait(draw.uniform(0.5, 6.0))
        launched.send(number)
        assert None not in launched.wait(60)
    launched = Launched(place, output, *KINDS[count], "--resume", "auto", processes=count)
    assert launched.wait(300) == [0] * count, launched.printed.read_text()
    assert_equal_runs(output, whole)
