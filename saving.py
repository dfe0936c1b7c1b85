"""Checkpoints of a training run, written while it goes on, and the state of each process that they hold."""

import argparse
import platform
import random
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import runs
import utils
from files import save_tensors
from models.checkpoint import CheckpointError, check_resumable, diverged, read_checkpoint
from runs import Position
from system_errors import describe_os_error

Content = dict[str, Any]


# ---- writing


class Interval(NamedTuple):
    """How often something is done: every so many steps, or seconds; 0 and 0: never."""

    steps: int = 0
    seconds: float = 0.0


def interval(text: str) -> Interval:
    """An argparse type: "2000" steps, or "90s", "30m", "1.5h"."""
    found = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)([smh])", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"must be a number of steps, or a time such as 90s, 30m or 2h, not {text!r}")
    if found[1]:
        return Interval(steps=int(found[1]))
    return Interval(seconds=float(found[2]) * {"s": 1, "m": 60, "h": 3600}[found[3]])


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

    def __init__(
        self, folder: Path, keep_last: int, keep_epochs: int | None, every: Interval, decisive: str = ""
    ) -> None:
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

    def save(self, at: Position, content: Content) -> None:
        """Begin to write the checkpoint of a position, once the one before is written."""
        self.wait()
        self.path = runs.checkpoint_path(self.folder, at)
        self.pending = self.thread.submit(self._write, self.path, on_host(content))
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


# ---- random numbers


def random_state(device: torch.device) -> Content:
    """The states of Python's, NumPy's and PyTorch's generators in this process, as plain values and tensors."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()  # noqa: NPY002 - libraries may draw from it
    _, keys, place, has_gauss, cached = numpy
    state: Content = {
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Content, device: torch.device) -> None:
    """Put back what `random_state` returned; of a GPU only where it was one and is one."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, place, has_gauss, cached = state["numpy"]
    if not 0 <= place <= len(keys):  # NumPy would read beyond its words
        raise ValueError(f"NumPy's generator stands at word {place} of {len(keys)}")
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), place, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].clone())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


# ---- going on


def choose_start(args: argparse.Namespace) -> tuple[str | Path, bool]:
    """The checkpoint to start from, "" for none, and whether its run goes on; rank 0 chooses for all processes.

    --resume goes on from --checkpoint, or from the newest checkpoint of --output_dir. --resume auto goes on from the
    newest one there that is whole, and where there is none, begins with the weights of --checkpoint.

    Raises:
        CheckpointError: a process does not see the file.
    """
    folder, chosen = Path(args.output_dir), (args.checkpoint, bool(args.checkpoint and args.resume))
    if utils.rank() == 0 and args.resume == "auto":
        whole = newest_whole(folder)
        chosen = (str(whole), True) if whole else (args.checkpoint, False)
    elif utils.rank() == 0 and args.resume and not args.checkpoint:
        newest = runs.newest_checkpoint(folder)
        if not newest:
            utils.log(f"--resume: {folder} holds no checkpoint yet, starting from the beginning")
        chosen = (str(newest or ""), newest is not None)
    path, goes_on = utils.gather_objects(chosen)[0]
    lacking = utils.gather_objects("" if not path or Path(path).exists() else platform.node())
    if any(lacking) and not all(lacking):
        which = ", ".join(f"process {rank} on {node}" for rank, node in enumerate(lacking) if node)
        raise CheckpointError(f"{path}: not seen by {which}; all processes need the same files: share the folder")
    return path, goes_on


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder that is whole; those that are not are named."""
    for path in reversed(runs.checkpoints(folder).values()):
        try:
            content = read_checkpoint(path)
            check_resumable(content, path)
            progress_of(content, path)
            return path
        except CheckpointError as error:
            utils.log(f"warning: {error}\n  looking for a checkpoint before it")
    return None


def progress_of(checkpoint: Content, path: str | Path) -> Content:
    """How far a checkpoint's run has come; of a file that says only its epoch, as the release's, that is its end.

    Returns:
        "epoch" and "step": the position; "samples": those of the epoch that are done, over all processes; "broken":
        indices of entries whose images could not be read; "processes": the state of each (`Run.process_state`).

    Raises:
        CheckpointError: it is not of that form.
    """
    beginning = {"epoch": checkpoint["epoch"] + 1, "step": 0, "samples": 0, "broken": [], "processes": []}
    progress = checkpoint.get("progress", beginning)
    counts, lists = ("epoch", "step", "samples"), ("broken", "processes")
    if not (
        isinstance(progress, dict)
        and all(type(progress.get(key)) is int and progress[key] >= 0 for key in counts)
        and all(type(progress.get(key)) is list for key in lists)
        and all(type(index) is int and index >= 0 for index in progress["broken"])
        and all(isinstance(state, dict) for state in progress["processes"])
    ):
        raise CheckpointError(f"{path}: cannot resume, its 'progress' is damaged; take the checkpoint before it")
    return progress


def check_agreement(model: nn.Module, path: str | Path, start: Position) -> None:
    """Raise `CheckpointError` unless all processes begin alike, with the same weights (a collective call).

    Call it before `DistributedDataParallel` gives all of them those of process 0.
    """
    if utils.world_size() == 1:
        return
    # Of the weights' bits, as integers: that sum does not depend on the order in which a machine adds.
    total = sum(int(tensor.reshape(-1).view(torch.int32).sum()) for tensor in model.state_dict().values())
    found = utils.gather_objects((str(path), start, total, platform.node()))
    for rank, other in enumerate(found):
        if other[:3] != found[0][:3]:
            told = "; ".join(
                f"process {number} on {node}: {file or 'no checkpoint'}, epoch {at.epoch}, step {at.step}, sum {total}"
                for number, (file, at, total, node) in ((0, found[0]), (rank, other))
            )
            raise CheckpointError(f"the processes begin with different weights: {told}")
