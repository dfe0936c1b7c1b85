"""What a training run says while it goes on: progress bar, steps.jsonl, log.txt, printed lines and TensorBoard."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import runs
import utils

if TYPE_CHECKING:
    from grounding.pictures.tensorboard import Board

INTERVAL = 20  # steps between two lines of steps.jsonl; reading the means waits for the device


class Meters:
    """Running means of named scalars. The sums stay on the scalars' device, so that `add` does not wait for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            total = self.sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=value.device))
            total += value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means of what this process has added; waits for the device."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def means_of_all(self) -> dict[str, float]:
        """Means over all processes, which have added equally often (a collective call)."""
        means = self.means()
        if utils.world_size() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            packed = torch.tensor(list(means.values()), dtype=torch.float64, device=device)
            dist.all_reduce(packed)
            means = dict(zip(means, (packed / utils.world_size()).tolist(), strict=True))
        return means


class TrainingLog:
    """The log of one run. All processes call it alike; rank 0 alone writes.

    Args:
        folder: the run's output folder.
        epoch_steps: optimizer steps of a whole epoch.
        board: what draws for TensorBoard, if anything does.
    """

    def __init__(self, folder: Path, epoch_steps: int, board: "Board | None" = None) -> None:
        self.folder, self.epoch_steps, self.board = folder, epoch_steps, board

    def steps(self, epoch: int, count: int) -> Iterator[int]:
        """Begin an epoch: its steps 0 to count - 1, with a progress bar."""
        self.epoch, self.begun, self.count = epoch, epoch * self.epoch_steps, count
        self.of_epoch, self.recent = Meters(), Meters()
        if self.board:
            self.board.restart_clock(self.begun)
        started = time.monotonic()
        self.bar = tqdm(range(count), desc=f"epoch {epoch}", unit="step", disable=None if utils.rank() == 0 else True)
        yield from self.bar
        self.seconds = time.monotonic() - started

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count named scalars of the current step: its losses, its learning rate."""
        self.of_epoch.add(values)
        self.recent.add(values)

    def is_due(self, step: int) -> bool:
        """Whether `end_step` will write a line."""
        return (step + 1) % INTERVAL == 0 or step == self.count - 1

    def end_step(self, step: int) -> None:
        """Show and write the means since the last line if that is due, and heat maps if they are."""
        done = self.begun + step + 1
        if self.is_due(step):
            means, self.recent = self.recent.means(), Meters()
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
            self._write(runs.STEPS_LOG, {"epoch": self.epoch, "step": step, **means})
            if self.board:
                self.board.write_steps(done, means)
        if self.board:
            self.board.after_step(done)

    def end_epoch(self, broken_images: int) -> None:
        """Write and print the means of the epoch, over all processes (a collective call)."""
        means = self.of_epoch.means_of_all()
        length = {"steps": self.count, "seconds": round(self.seconds, 2)}
        row = {f"train_{name}": value for name, value in means.items()} | length
        self._write(runs.EPOCHS_LOG, row | {"epoch": self.epoch, "broken_images": broken_images})
        shown = " ".join(f"{name} {value:.4g}" for name, value in (means | length).items())
        utils.log(f"epoch {self.epoch}: {shown}")
        if self.board:
            self.board.write_epoch(self.begun + self.count, means)

    def close(self) -> None:
        if self.board:
            self.board.close()

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if utils.rank() == 0:
            runs.append_row(self.folder / name, row)
