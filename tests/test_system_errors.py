"""One boundary for all programs: what the system refuses is a message, a fault of ours keeps its traceback."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import utils

TRAINING = argparse.Namespace(accum_steps=1, grad_checkpointing=False, precision="fp32", num_workers=4)
EVALUATION = argparse.Namespace(precision="fp32", num_workers=4)


def message(function: Callable[[], object], args: argparse.Namespace = TRAINING) -> str:
    """What a program that does nothing but `function` ends with."""
    with pytest.raises(SystemExit) as ended:
        utils.run(lambda _: function() and None, args)
    return str(ended.value.code)


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


# ---- files


def test_a_full_disk_is_told_with_file_and_sizes(tmp_path: Path) -> None:
    def write() -> None:
        with utils.atomic_path(tmp_path / "sub" / "weights.pth", needed=3_500_000_000) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    said = message(write)
    assert said.startswith(
        f"error: {tmp_path}/sub/weights.pth: cannot be written, no space is left (3.50 GB are needed"
    )
    assert "are free in" in said
    assert not list((tmp_path / "sub").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_a_log_on_a_full_disk() -> None:
    assert "no space is left" in message(lambda: Path("/dev/full").write_text("x"))


def test_what_the_system_refuses_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    said = message(lambda: utils.write_text(tmp_path / "out" / "log.txt", ""))
    assert said == f"error: {tmp_path}/out/log.txt: File exists; a part of the path is a file, not a folder"
    said = message(lambda: Path("no/such/file").read_text())
    assert said == "error: no/such/file: No such file or directory; check the path"
    for code in (errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.EMFILE):
        said = message(raising(OSError(code, os.strerror(code), "some/file.json")))
        assert said.startswith(f"error: some/file.json: {os.strerror(code)}; ")


def test_an_error_of_reading_inside_the_block_names_what_was_read(tmp_path: Path) -> None:
    def write() -> None:
        with utils.atomic_path(tmp_path / "out.json"):
            (tmp_path / "in.json").read_text()

    assert message(write).startswith(f"error: {tmp_path}/in.json: No such file")


@pytest.mark.parametrize(
    "error", [OSError("broken data stream"), KeyError("momentum"), RuntimeError("shape"), OSError(5)]
)
def test_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        utils.run(lambda _: raising(error)(), TRAINING)


# ---- memory


GPU = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a capacity of ...")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 20 bytes.")


@pytest.mark.parametrize(
    ("lacking", "args", "start"),
    [
        (lambda: torch.empty(10**15), TRAINING, "this machine is out of memory (4000000000000000 bytes more were"),
        *(
            (function, EVALUATION, "this machine is out of memory")
            for function in (raising(MemoryError()), raising(CPU))
        ),
        (raising(GPU), EVALUATION, "the GPU is out of memory (20.00 MiB more were asked for); try a smaller --set"),
    ],
)
def test_memory_that_is_lacking(lacking: Callable[[], object], args: argparse.Namespace, start: str) -> None:
    said = message(lacking, args)
    assert said.startswith(f"error: {start}")
    assert "a smaller --set batch_size=N" in said
    assert ("--accum_steps" in said) == ("--grad_checkpointing" in said) == (args is TRAINING)


# ---- processes


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR expected, but not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT expected, but not set"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}, "RANK=x"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "none"}, "MASTER_PORT=none"),
    ],
)
def test_half_an_environment_of_a_launcher(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = message(lambda: utils.init_distributed(torch.device("cpu")))
    assert named in said
    assert "start the program by torchrun, or pass --distributed false" in said


def test_a_cluster_job_of_one_process_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    utils.init_distributed(torch.device("cpu"))
    assert utils.world_size() == 1


@pytest.mark.parametrize("name", ["gpu", "0", "mps", "cuda:", "cuda:x", "CPU", "", "meta", "cpu:1"])
def test_what_is_no_device(name: str) -> None:
    assert message(lambda: utils.choose_device(name)).startswith(f"error: --device {name}: must be cpu, cuda, or one")


@pytest.mark.parametrize(("name", "local"), [("cuda:2", "0"), ("cuda", "5")])
def test_a_gpu_that_is_not_there(name: str, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert f"GPU {max(int(local), 2)} is asked for, and PyTorch sees 2" in message(lambda: utils.choose_device(name))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.choose_device(None) == torch.device("cpu")
    assert capsys.readouterr().out == "No GPU found: running on the CPU.\n"
    assert "--device cuda: this machine has no CUDA device" in message(lambda: utils.choose_device("cuda"))


# ---- messages of loader processes


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        try:
            raise utils.UserError("an earlier one")
        except utils.UserError:
            raise utils.UserError("x.jpg cannot be decoded (OSError: bad, UserError: worse)\nsecond line") from None


def test_the_message_of_a_loaders_process_comes_whole() -> None:
    said = message(lambda: list(DataLoader(Broken(), num_workers=1)))
    assert said == "error: x.jpg cannot be decoded (OSError: bad, UserError: worse)\nsecond line"


# ---- terminals


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_a_phrase(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    utils.run(lambda _: print("片 \udc80 ok"), TRAINING)
    assert sys.stdout is screen
    screen.seek(0)
    shown = screen.read()
    assert shown == ("片" if encoding == "utf-8" else "\\u7247") + " \\udc80 ok\n"


def test_escapes_in_files_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def speak(_: argparse.Namespace) -> None:
        print("a phrase \x1b[2J\x9b31m\x07\tand\x00 more")
        print("\x1b]0;title\x07", file=sys.stderr)
        raise utils.UserError("bad \x1b[31mfile")

    with pytest.raises(SystemExit) as ended:
        utils.run(speak, TRAINING)
    shown = capsys.readouterr()
    assert shown.out == "a phrase \\x1b[2J\\x9b31m\\x07\tand\\x00 more\n"
    assert shown.err == "\\x1b]0;title\\x07\n"
    assert str(ended.value.code) == "error: bad \\x1b[31mfile"


def test_a_file_name_that_is_no_text_can_be_written_to_json(tmp_path: Path) -> None:
    utils.write_text(tmp_path / "a.json", '"\udc80"')
    assert (tmp_path / "a.json").read_text() == '"\\udc80"'
