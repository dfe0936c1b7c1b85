"""The order in which an epoch's samples are drawn, dealt out to the processes."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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
