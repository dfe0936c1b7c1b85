"""Loader processes: shared memory that is too small for them, and a process that is killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import Pretrain
from dataset import workers
from dataset.transforms import resize_bilinear_image
from dataset.workers import WorkerError, check_shared_memory, killed_workers_explained
from grounding.batches import ImageData, load_images


def with_free(monkeypatch: pytest.MonkeyPatch, folder: Path, megabytes: float) -> None:
    monkeypatch.setattr(workers, "SHARED_MEMORY", folder)
    status = SimpleNamespace(f_bavail=int(megabytes * 1000), f_frsize=1000)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: {folder: status}[path])


@pytest.mark.parametrize(
    ("count", "batches", "processes", "needed"),
    [(4, 100, 1, 80), (1, 100, 1, 20), (4, 3, 1, 30), (4, 100, 8, 640), (0, 100, 1, 0)],
)
def test_what_the_batches_need(
    count: int, batches: int, processes: int, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with_free(monkeypatch, tmp_path, needed)
    check_shared_memory(count, batches, 10**7)
    if needed:
        with_free(monkeypatch, tmp_path, needed - 0.1)
        message = rf"--num_workers {count}: .* need {needed}\.0 MB .* has {needed - 0.1:.1f} MB free: .*--ipc=host"
        with pytest.raises(WorkerError, match=message + ".*--shm-size.*--num_workers 0"):
            check_shared_memory(count, batches, 10**7)


def test_systems_without_shared_memory_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path / "absent")
    check_shared_memory(8, 100, 10**15)


def test_evaluation_checks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path in paths:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    data = ImageData(paths, resize_bilinear_image, 100, skip_broken=False)
    with_free(monkeypatch, tmp_path, 0.5)  # an image takes 0.12 MB
    with pytest.raises(WorkerError, match=r"need 0\.7 MB of shared memory, .* has 0\.5 MB free"):
        list(load_images(data, 2, 2))
    assert len(list(load_images(data, 2, 0))) == 3


class Deadly(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_loader_process_is_explained() -> None:
    with (
        pytest.raises(WorkerError, match=r"a loader process .*: too little memory\? Try .*--ipc=host"),
        killed_workers_explained(),
    ):
        list(DataLoader(Deadly(), num_workers=1))


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (
            "DataLoader worker (pid 77) is killed by signal: Bus error. It is",
            "killed by signal: Bus error",
        ),
        ("DataLoader worker (pid 77) is killed by signal: Killed. ", "is killed by signal: Killed"),
        ("DataLoader worker (pid(s) 5, 6) exited unexpectedly", "exited unexpectedly"),
        ("DataLoader worker (pid 5) exited unexpectedly with exit code 1. Details are lost", "exited unexpectedly"),
    ],
)
def test_the_messages_of_pytorch(message: str, what: str) -> None:
    with pytest.raises(WorkerError, match=what), killed_workers_explained():
        raise RuntimeError(message)


@pytest.mark.parametrize("error", [RuntimeError("cannot be multiplied"), KeyError("DataLoader worker")])
def test_other_errors_stay_what_they_are(error: Any) -> None:
    with pytest.raises(type(error)) as seen, killed_workers_explained():
        raise error
    assert seen.value is error


def test_training_checks_it(tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(batch_size=10, image_res=100, mask_size=100)  # 1.6 MB a batch
    args = Pretrain.parse_args(["--num_workers", "2"])
    with_free(monkeypatch, tmp_path, 6.3)
    with pytest.raises(WorkerError, match=r"--num_workers 2: batches that are ready need 6\.4 MB"):
        Pretrain.build_loader(range(100), None, config, args)  # type: ignore[arg-type]
