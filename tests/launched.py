"""Runs of Pretrain.py in processes that can be killed; they are forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import Pretrain
import utils
from tests.training_runs import arguments

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["Pretrain", "tests.launched"])


def program(words: list[str], environment: dict[str, str], printed: Path, spoil: Callable[[], None] | None) -> None:
    """Run Pretrain.py, after `spoil`."""
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as in a run that a shell starts
    os.environ.update(environment)
    sys.argv = ["Pretrain.py", *words]
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), stream)
    with open(1, "a", closefd=False) as sys.stdout, open(2, "a", closefd=False) as sys.stderr:
        torch.set_num_threads(1)
        if spoil:
            spoil()
        utils.run(Pretrain.main, Pretrain.parse_args(words))


class Launched:
    """Processes of one run; what they print is in `printed`."""

    def __init__(
        self, place: Path, output: Path, *words: str, processes: int = 1, spoil: Callable[[], None] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        self.output, self.printed = output, output.with_suffix(".printed")
        self.printed.write_text("")
        self.known = set(output.glob("*.pth"))
        line = arguments(place, output, *words)
        self.processes: list[BaseProcess] = []
        for rank in range(processes):
            environment = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            self.processes.append(SERVER.Process(target=program, args=(line, environment, self.printed, spoil)))
        for process in self.processes:
            process.start()

    def said(self) -> str:
        return self.printed.read_text()

    def wait(self, seconds: float = 600) -> list[int | None]:
        """The exit statuses once all have ended; None for one that has not after `seconds`."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def send(self, number: int, to: int | None = None) -> None:
        """Send a signal to all processes, or to one."""
        for process in self.processes if to is None else [self.processes[to]]:
            if process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def until_saved(self) -> None:
        """Wait until there is a checkpoint more than at the start, or the run has ended."""
        while self.known >= set(self.output.glob("*.pth")) and None in self.wait(0):
            time.sleep(0.01)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()
