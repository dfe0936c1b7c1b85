"""The order in which a process of a group ends: message, the others, its end; never a collective on the way."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, and not declared so

import signals
import utils

ROOT = Path(__file__).parents[1]


class Ended(BaseException):
    """What stands for the end of a process."""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What process 1 of two does, in order, with NCCL; its end is an exception."""
    done: list[Any] = []

    def end(status: int) -> None:
        done.append(status)
        raise Ended

    class Watch:
        tell = staticmethod(lambda message: done.append("tell") or message)
        close = staticmethod(lambda: done.append("close"))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for name in ("barrier", "destroy_process_group", "all_reduce", "all_gather_object"):
        monkeypatch.setattr(dist, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(utils._group, "watch", Watch())
    return done


def run(error: BaseException | None) -> None:
    def main(args: Namespace) -> None:
        if error:
            raise error

    with pytest.raises(Ended):
        utils.run(main, Namespace())


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (utils.UserError("no such file"), "error: no such file", 1),
        (ZeroDivisionError("a fault"), "ZeroDivisionError: a fault", 1),
        (SystemExit("stop"), "SystemExit: stop", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (RuntimeError("Connection closed by peer [10.0.0.1]"), "lost the connection to another one", 1),
    ],
)
def test_a_failing_process_calls_no_collective(
    error: BaseException, message: str, status: int, done: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(error)
    assert done == ["tell", status]
    said = capsys.readouterr().err
    assert said.startswith("process 1 of 2 on ")
    assert message in said


@pytest.mark.parametrize(("error", "status"), [(None, 0), (utils.AgreedExit(143), 143)])
def test_processes_that_agree_wait_for_each_other(error: BaseException | None, status: int, done: list[Any]) -> None:
    run(error)
    assert done == ["barrier", "close", "destroy_process_group", status]


def test_a_start_has_a_name_that_no_earlier_one_had() -> None:
    store, count = HashStore(), 3
    names = set()
    for came in (3, 2, 1, 3):  # a process that is killed early leaves its question, or none
        name = functools.partial(utils.name_of_start, store, count=count, patience=timedelta(seconds=1))
        with ThreadPoolExecutor(count) as processes:
            asked = [processes.submit(name, own) for own in range(came)]
        if came < count:
            with pytest.raises(
                dist.DistStoreError, match=rf"^{count - came} of 3 processes have not come within 0:00:01"
            ):
                asked[0].result()
        else:
            assert len(agreed := {each.result() for each in asked}) == 1
            assert not names & agreed
        names |= {each.result() for each in asked[1:]}


@pytest.mark.parametrize("before", [0, signal.SIGTERM])
@pytest.mark.parametrize("between", [0, signal.SIGTERM])
def test_a_second_interrupt_ends_at_once(before: int, between: int) -> None:
    code = f"""
import os, signal
import signals
with signals.Requests() as requests:
    requests.begin()
    os.kill(os.getpid(), {before})
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), {between})
    assert requests.agreed(False) == (False, {max(before, between, signal.SIGINT)})
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit("not ended")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGINT
    first, second = ended.stderr.splitlines()
    assert first == "SIGINT: the run saves and ends after this step; a second Ctrl-C ends it at once"
    assert second == "stopped at once, without a checkpoint"


def test_a_signal_while_the_others_are_waited_for_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process waits for the slowest one in each step; a signal that comes meanwhile counts for the next step."""

    def exchange(values: list[int]) -> list[int]:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGUSR1)
        return values

    monkeypatch.setattr(utils, "largest_of_all", exchange)
    with signals.Requests() as requests:
        assert [requests.agreed(False)[0] for _ in range(3)] == [False, True, False]


def test_torchruns_echo_is_no_second_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = list[int]()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "_exit", ended.append)
    with signals.Requests() as requests:
        requests.begin()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert ended == []
        monkeypatch.setattr(signals, "ECHO", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [128 + signal.SIGINT]


def _work(messages: Connection) -> None:
    signals.ignore_in_worker()
    messages.send("ready")
    while True:
        messages.send(messages.recv())


def _is_pending(process: int | None, number: signal.Signals) -> bool:
    """Whether a signal was sent to a process that has not taken it yet."""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(status.partition("ShdPnd:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="Linux alone tells who sent a signal")
def test_a_loader_process_outlives_signals_of_others() -> None:
    """Those to the group, as by Ctrl-C or a scheduler; of its training process, SIGTERM ends it."""
    own, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_work, args=[theirs])
    worker.start()
    try:
        assert own.recv() == "ready"
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
            own.send(number)
            assert own.recv() == number
        while _is_pending(worker.pid, signal.SIGTERM):  # the system would merge the next one with it
            time.sleep(0.01)
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0
    finally:
        worker.kill()
