"""Loading: shared memory that is too small for its processes, one that is killed, and the order of an epoch."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import Pretrain
from dataset.loader import workers
from dataset.loader.workers import EpochOrder, WorkerError, check_shared_memory, killed_workers_explained
from dataset.text import load_tokenizer
from dataset.transforms import resize_bilinear_image
from dataset.vg import TrainingData
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
    config = tiny_config(batch_size=10, image_res=100, mask_size=100)  # 0.4 MB a batch, and its words
    args = Pretrain.parse_args(["--num_workers", "2"])
    with_free(monkeypatch, tmp_path, 1.59)
    order = EpochOrder(100, 1, 0, seed=0)
    with pytest.raises(WorkerError, match=r"--num_workers 2: batches that are ready need 1\.6 MB"):
        Pretrain.build_loader(range(100), order, None, config, args)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", ["dog", "big brown dog " * 30])
def test_what_is_checked_is_what_batches_take(
    words: str, tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one in a hundred more, and never less."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "0.png")
    rows = [{"image": "0.png", "caption": words, "bbox": [[0, 0, 4, 4]]}] * 8
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nbig\nbrown\ndog\n")
    files = {"train_file": [str(tmp_path / "train.json")], "image_root": str(tmp_path)}
    config = tiny_config(batch_size=4, image_res=256, mask_size=256, **files)
    checked: list[int] = []
    monkeypatch.setattr("training.parts.check_shared_memory", lambda _workers, _batches, size: checked.append(size))
    args = Pretrain.parse_args(["--num_workers", "0"])
    data = TrainingData(config, seed=0)
    loader = Pretrain.build_loader(data, EpochOrder(8, 1, 0, 0), load_tokenizer(str(tmp_path)), config, args)
    taken = [sum(tensor.nbytes for tensor in batch) for batch in loader]
    assert len(taken) == 2
    assert all(size <= checked[0] <= 1.01 * size for size in taken)


# ---- the order of an epoch


@pytest.mark.parametrize(("length", "processes"), [(1, 1), (7, 1), (10, 3), (12, 4), (2, 5), (97, 8)])
def test_the_order_is_that_of_pytorch(length: int, processes: int) -> None:
    for rank in range(processes):
        order = EpochOrder(length, processes, rank, seed=3)
        known = DistributedSampler(range(length), processes, rank, shuffle=True, seed=3)  # type: ignore[arg-type]
        for order.epoch in (0, 1, 5):
            known.set_epoch(order.epoch)
            expected = list(known)
            for order.begin in (0, len(expected) // 2, len(expected)):
                assert list(order) == expected[order.begin :]
                assert len(order) == len(expected) - order.begin
