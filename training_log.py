"""What a training run says while it goes on: progress bar, steps.jsonl, log.txt, printed lines and TensorBoard."""

import time
from collections.abc import Iterator, Mapping, Sequence
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
        self.counts: dict[str, float] = {}

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

    def state(self) -> dict[str, Any]:
        """Sums and counts, as plain values."""
        return {"sums": {name: float(total) for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def restore(self, states: Sequence[Mapping[str, Any]], share: float = 1.0) -> None:
        """Go on from `share` of the sums and counts in states, so that all processes together have all of them."""
        for state in states:
            for name, total in state["sums"].items():
                device = self.sums[name].device if name in self.sums else None
                old = self.sums.get(name, torch.zeros((), dtype=torch.float64, device=device))
                self.sums[name] = old + share * float(total)
                self.counts[name] = self.counts.get(name, 0) + share * float(state["counts"][name])


class TrainingLog:
    """The log of one run. All processes call it alike; rank 0 alone writes.

    Args:
        folder: the run's output folder.
        epoch_steps: optimizer steps of a whole epoch.
        board: what draws for TensorBoard, if anything does.
    """

    def __init__(self, folder: Path, epoch_steps: int, board: "Board | None" = None) -> None:
        self.logs, self.epoch_steps, self.board = runs.Logs(folder), epoch_steps, board
        self.window = 0  # the step whose loss is the first since the last line, `opening`

    def begin_epoch(self, epoch: int, count: int, begin: int) -> None:
        """Begin an epoch of `count` steps, of which `begin` are done."""
        self.epoch, self.begun, self.count, self.begin = epoch, epoch * self.epoch_steps, count, begin
        self.of_epoch, self.recent = Meters(), Meters()
        self.window, self.seconds = begin, 0.0
        self.opening: dict[str, float] = {}
        if self.board:
            self.board.restart_clock(self.begun + begin)

    def steps(self) -> Iterator[int]:
        """The steps of the epoch that are left, with a progress bar."""
        self.started = time.monotonic() - self.seconds
        quiet = None if utils.rank() == 0 else True
        steps = range(self.begin, self.count)
        self.bar = tqdm(steps, f"epoch {self.epoch}", self.count, initial=self.begin, unit="step", disable=quiet)
        yield from self.bar
        self.seconds = time.monotonic() - self.started

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
        if step == self.window:
            self.opening = self.recent.means()
        if self.is_due(step):
            means, self.recent, self.window = self.recent.means(), Meters(), step + 1
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

    def state(self) -> dict[str, Any]:
        """What this process has counted since the epoch began and since the last line, as plain values."""
        meters = {"of_epoch": self.of_epoch.state(), "recent": self.recent.state()}
        return {**meters, "window": self.window, "opening": self.opening, "seconds": time.monotonic() - self.started}

    def restore(self, states: Sequence[Mapping[str, Any]], own: int | None) -> None:
        """Go on from what processes had counted at the step that the epoch now begins with.

        Args:
            own: which of the states was this process's; None: they stood at another step, or were another number of
                processes, so that each takes an equal share of all.
        """
        for name, meters in (("of_epoch", self.of_epoch), ("recent", self.recent)):
            found = [state[name] for state in states]
            meters.restore(found if own is None else [found[own]], 1.0 if own is not None else 1 / utils.world_size())
        self.seconds = float(states[0]["seconds"])
        if own is not None:
            self.window = int(states[own]["window"])
            self.opening = {name: float(value) for name, value in states[own]["opening"].items()}

    def close(self) -> None:
        """End what is shown; raises `UserError` where lines of the logs could not be written."""
        if self.board:
            self.board.close()
        self.logs.finish()

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if utils.rank() == 0:
            self.logs.append(name, row)
