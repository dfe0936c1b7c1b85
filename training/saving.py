"""Checkpoints of a training run, written while it goes on; what they hold: state.py."""

import argparse
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import runs
import utils
from files import save_tensors
from models.checkpoint import diverged
from system.errors import describe_os_error

Content = dict[str, Any]


class Every(NamedTuple):
    """How often something is done: every so many steps, or seconds; 0 and 0: never."""

    steps: int = 0
    seconds: float = 0.0


def interval(text: str) -> Every:
    """An argparse type: "2000" steps, or "90s", "30m", "1.5h"."""
    found = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)([smh])", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"must be a number of steps, or a time such as 90s, 30m or 2h, not {text!r}")
    if found[1]:
        return Every(steps=int(found[1]))
    return Every(seconds=float(found[2]) * {"s": 1, "m": 60, "h": 3600}[found[3]])


class Saver:
    """Writes checkpoints on rank 0, one at a time, in a thread: training waits for the copy to host memory alone.

    A checkpoint that cannot be written is told, the earlier ones stay, and training goes on; `finish` raises if it was
    the last one.

    Args:
        folder: the run's output folder.
        keep_last: how many checkpoints within epochs are kept.
        keep_epochs: how many checkpoints of whole epochs are kept; None: all.
        every: how often one is due within an epoch.
        decisive: the key of log.txt by which best.pth is chosen; "": it is not.
    """

    def __init__(self, folder: Path, keep_last: int, keep_epochs: int | None, every: Every, decisive: str = "") -> None:
        self.folder, self.keep_last, self.keep_epochs, self.every = folder, keep_last, keep_epochs, every
        self.decisive = decisive
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        self.failure: utils.UserError | None = None
        self.path: Path | None = None  # of the last one that was begun
        self.saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, `step` optimizer steps after the run's beginning."""
        by_time = utils.rank() == 0 and 0 < self.every.seconds <= time.monotonic() - self.saved_at
        return by_time or (self.every.steps > 0 and step % self.every.steps == 0)

    def save(self, path: Path, content: Content) -> None:
        """Begin to write a checkpoint of the run's folder, once the one before is written."""
        self.wait()
        self.path = path
        self.pending = self.thread.submit(self._write, path, on_host(content))
        self.saved_at = time.monotonic()

    def wait(self) -> None:
        """Wait until what was begun is written."""
        if self.pending:
            self.pending.result()
            self.pending = None

    def finish(self) -> None:
        """Wait, and raise `UserError` where the last checkpoint could not be written."""
        self.wait()
        if self.failure:
            raise self.failure

    def _write(self, path: Path, content: Content) -> None:
        if problem := diverged(content["model"]):
            self.failure = utils.UserError(f"{path}: not written, the weights diverged ({problem})")
        else:
            try:
                save_tensors(path, content)
                self.failure = None
                if self.decisive:
                    runs.link_best(self.folder, content["log"], self.decisive)
                self._remove_old()
            except utils.UserError as error:
                self.failure = error
            except OSError as error:  # of a folder that nobody may list or change
                self.failure = utils.UserError(describe_os_error(error))
        if self.failure:
            kept = next(reversed(runs.checkpoints(self.folder).values()), None)
            last = f"the last checkpoint is {kept}" if kept else "there is no checkpoint yet"
            utils.log(f"warning: {self.failure}\n  training goes on; {last}")

    def _remove_old(self) -> None:
        """Remove what is beyond `keep_last` and `keep_epochs`; never what best.pth stands for."""
        found = runs.checkpoints(self.folder)
        within, whole = [at for at in found if at.step], [at for at in found if not at.step]
        old = within[: -self.keep_last] + (whole[: -self.keep_epochs] if self.keep_epochs else [])
        best = runs.best_checkpoint(self.folder)
        for at in old:
            if found[at] != best:
                found[at].unlink(missing_ok=True)


def on_host(content: Any, copies: dict[Any, Tensor] | None = None) -> Any:
    """Plain containers copied, and their tensors copied to host memory; equal views of one storage share their copy."""
    copies = {} if copies is None else copies
    if isinstance(content, Tensor):
        where = content.device, content.untyped_storage().data_ptr(), content.storage_offset()
        key = *where, content.dtype, content.shape, content.stride()
        if key not in copies:
            copies[key] = content.detach().to("cpu", copy=True)
        return copies[key].detach()  # another tensor, of the same storage
    if isinstance(content, dict):
        return {key: on_host(value, copies) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(on_host(value, copies) for value in content)
    return content
