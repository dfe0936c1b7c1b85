"""What a training run says while it goes on: progress bar, steps.jsonl, log.txt, printed lines, TensorBoard and W&B."""

import datetime
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import runs
import utils

if TYPE_CHECKING:
    from grounding.pictures.tensorboard import Board

T = TypeVar("T")
Numbers = dict[str, float]

INTERVAL = 20  # steps between two lines of steps.jsonl; reading the means waits for the device
# The keys of steps.jsonl that tell of the machine: in all others, equal runs have equal lines.
MEASURED = ("samples_per_second", "samples_per_second_per_device", "data_wait", "peak_memory_gb", "seconds_left")


class Meters:
    """Running means of named scalars. The sums stay on the scalars' device, so that `add` does not wait for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            total = self.sums.get(name)  # on another device after `restore`
            self.sums[name] = value.detach().double() if total is None else total.to(value.device) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means of what this process has added; waits for the device."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def means_of_all(self) -> dict[str, float]:
        """Means over all processes, which have added equally often (a collective call)."""
        return average(utils.gather_objects(self.means()))

    def state(self) -> dict[str, Any]:
        """Sums and counts, as plain values."""
        return {"sums": {name: float(total) for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def restore(self, states: Sequence[Mapping[str, Any]], share: float = 1.0) -> None:
        """Go on from `share` of the sums and counts in states, so that all processes together have all of them."""
        for state in states:
            for name, total in state["sums"].items():
                old = self.sums.get(name, torch.zeros((), dtype=torch.float64))
                self.sums[name] = old + share * float(total)
                self.counts[name] = self.counts.get(name, 0) + share * float(state["counts"][name])


def average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each key over rows that have the same keys."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def peak_memory_gb(device: torch.device) -> float:
    """The most memory in GB (10^9 bytes) that this process has held: on a GPU of tensors, else what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class WandbRun:
    """The run on Weights & Biases: its config and the scalars that TensorBoard gets. Rank 0 has it.

    Raises:
        UserError: the package is missing.
    """

    def __init__(self, project: str) -> None:
        try:
            import wandb  # here, for only --wandb needs it
        except ImportError as error:
            raise utils.UserError(f"--wandb: the package is missing ({error}); pip install wandb") from None
        self.wandb: Any = wandb
        self.project = project

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin a run, or go on with the one whose id `folder` holds. wandb writes its own files there as well.

        Raises:
            UserError: wandb refuses, for instance without a key.
        """
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "run_id"
        run_id = known.read_text(encoding="utf-8").strip() if known.is_file() else None
        # Neither what is printed nor what is known of machine, code and packages.
        private = ("x_disable_stats", "x_disable_machine_info", "disable_git", "disable_code")
        settings = self.wandb.Settings(console="off", x_save_requirements=False, **dict.fromkeys(private, True))
        try:
            self.run = self.wandb.init(
                project=self.project, dir=folder.parent, id=run_id, resume="allow", config=config, settings=settings
            )
        except self.wandb.Error as error:
            message = f"--wandb {self.project}: {str(error).rstrip('.')}; WANDB_MODE=offline needs no account"
            raise utils.UserError(message) from error
        utils.write_text(known, self.run.id)

    def write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Scalars after `step` steps. wandb takes no step twice: those that a resumed run repeats, it has."""
        if step >= self.run.step:
            self.run.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class TrainingLog:
    """The log of one run. All processes call it alike; rank 0 alone writes.

    Args:
        folder: the run's output folder.
        total_steps: optimizer steps of the whole run.
        step_samples: samples of an optimizer step, over all processes.
        device: where this process trains.
        board: what draws for TensorBoard, if anything does.
        wandb: what writes to Weights & Biases, if anything does.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        step_samples: int,
        device: torch.device,
        board: "Board | None" = None,
        wandb: WandbRun | None = None,
    ) -> None:
        self.logs, self.total_steps, self.step_samples = runs.Logs(folder), total_steps, step_samples
        self.device, self.board, self.wandb = device, board, wandb
        self.window = 0  # the step whose loss is the first since the last line, `opening`
        self.first = (-1, 0.0)  # steps that were done, and the time, when this process began to train

    def begin_epoch(self, epoch: int, count: int, begin: int, before: int) -> None:
        """Begin an epoch of `count` steps, of which `begin` are done, after `before` steps of earlier epochs."""
        self.epoch, self.count, self.begin, self.begun = epoch, count, begin, before
        self.of_epoch, self.recent = Meters(), Meters()
        self.largest_norm: Tensor | None = None
        self.window, self.seconds = begin, 0.0
        self.opening: Mapping[str, SupportsFloat] = {}

    def steps(self) -> Iterator[int]:
        """The steps of the epoch that are left, with a progress bar."""
        now = time.monotonic()
        if self.first[0] < 0:
            self.first = self.begun + self.begin, now
        self.started = now - self.seconds
        self._restart_clock(self.begin)
        quiet = None if utils.rank() == 0 else True
        steps = range(self.begin, self.count)
        self.bar = tqdm(steps, f"epoch {self.epoch}", self.count, initial=self.begin, unit="step", disable=quiet)
        yield from self.bar
        self.seconds = time.monotonic() - self.started

    def waiting_for(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; the time until each is there counts as waiting for data."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count named scalars of the current step: its losses, its learning rate."""
        self.of_epoch.add(values)
        self.recent.add(values)

    def add_gradient_norm(self, norm: Tensor) -> None:
        """Count the norm of the current step's gradients, which all processes share."""
        self.add({"grad_norm": norm})
        self.largest_norm = norm if self.largest_norm is None else torch.maximum(norm, self.largest_norm)

    def is_due(self, step: int) -> bool:
        """Whether `end_step` will write a line."""
        return (step + 1) % INTERVAL == 0 or step == self.count - 1

    def end_step(self, step: int) -> None:
        """Show and write what the steps since the last line tell if that is due, and heat maps if they are.

        All processes exchange their numbers where a line is due (a collective call); between lines, nothing waits.
        """
        done = self.begun + step + 1
        if step == self.window:
            self.opening = {name: total.clone() for name, total in self.recent.sums.items() if is_loss(name)}
        if self.is_due(step):
            means, measured = self._look(step)
            self.recent, self.largest_norm, self.window = Meters(), None, step + 1
            self._write(runs.STEPS_LOG, {"epoch": self.epoch, "step": step, **means, **measured})
            self._show(means, measured)
            self._draw("steps", done, means | measured)
        if self.board:
            started = time.monotonic()
            self.board.after_step(done)
            self.looked += time.monotonic() - started  # the time of maps is not that of training

    def end_epoch(self, broken_images: int, accuracies: Mapping[str, float]) -> None:
        """Write and print the means of the epoch, over all processes (a collective call), and its validation's."""
        means = self.of_epoch.means_of_all()
        length = {"steps": self.count, "seconds": round(self.seconds, 2)}
        row = {f"train_{name}": value for name, value in means.items()} | length
        self._write(runs.EPOCHS_LOG, row | {"epoch": self.epoch, "broken_images": broken_images, **accuracies})
        shown = " ".join(f"{name} {value:.4g}" for name, value in (means | length).items())
        utils.log(f"epoch {self.epoch}: {shown}")
        if accuracies:
            shown = ", ".join(f"{name} {100 * value:.2f}%" for name, value in accuracies.items())
            utils.log(f"epoch {self.epoch}: {shown}")
        self._draw("epochs", self.begun + self.count, means | dict(accuracies))

    def state(self) -> dict[str, Any]:
        """What this process has counted since the epoch began and since the last line, as plain values."""
        return {
            "of_epoch": self.of_epoch.state(),
            "recent": self.recent.state(),
            "largest_norm": None if self.largest_norm is None else float(self.largest_norm),
            "window": self.window,
            "opening": {name: float(value) for name, value in self.opening.items()},
            "seconds": time.monotonic() - self.started,
        }

    def restore(self, states: Sequence[Mapping[str, Any]], own: int | None) -> None:
        """Go on from what processes had counted at the step that the epoch now begins with.

        Args:
            own: which of the states was this process's; None: they stood at another step, or were another number of
                processes, so that each takes an equal share of all.
        """
        for name, meters in (("of_epoch", self.of_epoch), ("recent", self.recent)):
            found = [state[name] for state in states]
            meters.restore(found if own is None else [found[own]], 1.0 if own is not None else 1 / utils.world_size())
        norms = [float(state["largest_norm"]) for state in states if state["largest_norm"] is not None]
        self.largest_norm = torch.tensor(max(norms), device=self.device) if norms else None
        self.seconds = float(states[0]["seconds"])
        if own is not None:
            self.window = int(states[own]["window"])
            self.opening = {name: float(value) for name, value in states[own]["opening"].items()}

    def close(self) -> None:
        """End what is shown; raises `UserError` where lines of the logs could not be written."""
        for each in (self.board, self.wandb):
            if each:
                each.close()
        self.logs.finish()

    def _restart_clock(self, step: int) -> None:
        """What follows `step` steps of the epoch counts for the rates of the next line."""
        self.looked_at, self.looked, self.waited = step, time.monotonic(), 0.0

    def _look(self, step: int) -> tuple[Numbers, Numbers]:
        """Means since the last line, and what is `MEASURED`; both over all processes (a collective call)."""
        own = self.recent.means()  # waits for the device: only now has the time of the steps passed
        now, done = time.monotonic(), self.begun + step + 1
        seconds, samples = now - self.looked, (step + 1 - self.looked_at) * self.step_samples
        told = utils.gather_objects((own, self.waited / seconds, peak_memory_gb(self.device)))
        losses, waits, peaks = zip(*told, strict=True)
        means = average(losses)
        if self.largest_norm is not None:
            means["grad_norm_max"] = float(self.largest_norm)
        rate = samples / seconds  # all processes end a step together: the clock of rank 0, which writes, is that of all
        begun, since = self.first
        left = (self.total_steps - done) * (now - since) / (done - begun)
        measured = (rate, rate / len(told), sum(waits) / len(told), max(peaks), left)
        self._restart_clock(step + 1)
        return means, {name: round(value, 3) for name, value in zip(MEASURED, measured, strict=True)}

    def _show(self, means: Numbers, measured: Numbers) -> None:
        """Rates and times beside the bar first: a narrow terminal cuts off the end."""
        rate, _, wait, memory, left = (measured[name] for name in MEASURED)
        first = {"samples/s": f"{rate:.1f}", "waiting": f"{wait:.0%}", "left": datetime.timedelta(seconds=round(left))}
        shown = {name: f"{value:.3g}" for name, value in means.items() if name != "grad_norm_max"}
        self.bar.set_postfix({**first, **shown, "memory": f"{memory:.1f}GB"})

    def _draw(self, group: str, step: int, values: Numbers) -> None:
        for each in (self.board, self.wandb):
            if each:
                each.write(group, step, values)

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if utils.rank() == 0:
            self.logs.append(name, row)


def is_loss(name: str) -> bool:
    return name.startswith("loss_")
