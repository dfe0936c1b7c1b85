"""Loading by processes: who loads which samples, and errors of loader processes that are not errors of the data."""

import contextlib
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Sampler

from utils import UserError

SHARED_MEMORY = Path("/dev/shm")  # through which loader processes of Linux hand batches over
PREFETCH = 2  # batches that PyTorch lets each loader process have ready
ADVICE = "docker run --ipc=host or a larger --shm-size, fewer --num_workers, or --num_workers 0 for no loader processes"


class WorkerError(UserError):
    """Loader processes that cannot work, or were killed."""


def check_shared_memory(workers: int, batches: int, batch_bytes: int) -> None:
    """Raise `WorkerError` if the batches that are ready at one time do not fit in shared memory.

    Otherwise loader processes would wait for ever, or die of a bus error.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's: training processes of this machine
    needed = processes * min(PREFETCH * workers, batches) * batch_bytes
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise WorkerError(
            f"--num_workers {workers}: batches that are ready need {needed / 1e6:.1f} MB of shared memory, "
            f"{SHARED_MEMORY} has {free / 1e6:.1f} MB free: {ADVICE}"
        )


@contextlib.contextmanager
def killed_workers_explained() -> Iterator[None]:
    """Turn PyTorch's error about a killed loader process, which can come at any moment, into a `WorkerError`."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid.*?\) (is killed by signal: [\w ]+|exited unexpectedly)", str(error))
        if found is None:
            raise
        raise WorkerError(f"a loader process {found[1].strip()}: too little memory? Try {ADVICE}") from error


def spare_memory(_worker: int = 0) -> None:
    """Called at a loader process's start: its garbage collector leaves the program's objects alone.

    It would touch each of them, and the system would copy what was shared: 100 MB a process.
    """
    gc.freeze()


class EpochOrder(Sampler[int]):
    """This process's samples of an epoch: every `processes`-th of a shuffled order that (seed, epoch) decides.

    The order is that of `torch.utils.data.DistributedSampler`, which keeps it as a list of Python integers (5 million
    take 200 MB a process) and cannot begin within an epoch. The first samples fill up the last round.
    """

    def __init__(self, length: int, processes: int, rank: int, seed: int) -> None:
        self.length, self.processes, self.rank, self.seed = length, processes, rank, seed
        self.epoch = self.begin = 0  # `begin`: this process's samples that are done

    def __len__(self) -> int:
        return -(-self.length // self.processes) - self.begin

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        rounds = -(-self.length // self.processes)
        mine = torch.arange(self.rank, rounds * self.processes, self.processes)[self.begin :] % self.length
        return map(int, order[mine].numpy())
