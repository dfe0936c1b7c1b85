"""What a checkpoint holds of a training run, and going on from one; saving.py writes it."""

import argparse
import contextlib
import os
import platform
import random
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

import runs
import utils
from config import Phase, PretrainConfig
from dataset.vg import TrainingData
from model_sizes import check_same_blip
from models.checkpoint import (
    CheckpointError,
    check_resumable,
    diverged,
    init_image_encoder,
    init_text_encoder,
    load_weights,
    read_checkpoint,
)
from models.pretrain import PretrainModel
from models.student import CONFIG, is_student
from optim import restore_optimizer
from runs import Position
from training.log import TrainingLog
from training.saving import Content


class TrainingState:
    """What a checkpoint holds, but for the log: the parts of a run, each as it is at the time of asking.

    Args:
        settings: what decides a run's numbers beside its config (`settings_of`).
        step_samples: samples of one optimizer step, over all processes.
        device: where this process trains.
    """

    def __init__(
        self,
        config: PretrainConfig,
        settings: Content,
        step_samples: int,
        data: TrainingData,
        model: PretrainModel,
        optimizer: Optimizer,
        schedule: Scheduler,
        scaler: torch.amp.GradScaler,
        device: torch.device,
    ) -> None:
        self.config, self.settings, self.step_samples, self.data = config, settings, step_samples, data
        self.model, self.optimizer, self.schedule, self.scaler = model, optimizer, schedule, scaler
        self.device = device

    def content(self, at: Position, log: TrainingLog) -> Content:
        """The content of a position's checkpoint; its tensors are those that training goes on to change (collective).

        Within an epoch, it holds of each process what the next step depends on there alone: random numbers, and what
        the log has counted.
        """
        own = {"random": random_state(self.device), "log": log.state()} if at.step else {}
        progress = {
            "epoch": at.epoch,
            "step": at.step,
            "samples": at.step * self.step_samples,
            "broken": self.data.broken_anywhere(),
            "processes": utils.gather_objects(own),
        }
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "epoch": at.epoch - 1,  # the last one that is done
            "progress": progress,
            "run": self.settings,
        }

    def restore(self, checkpoint: Content, path: str | Path) -> None:
        """Put moments, loss scale and broken images back, and say what else differs.

        Rates and schedule are the config's: the schedule's time follows from epoch and step.
        """
        restore_optimizer(self.optimizer, checkpoint["optimizer"], self.config.optimizer, path)
        if scale := checkpoint.get("scaler"):
            try:
                self.scaler.load_state_dict(scale)
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: its 'scaler' is no loss scale of fp16") from error
        self.say_changes(checkpoint, path, self.config)
        known, broken = checkpoint.get("run"), progress_of(checkpoint, path)["broken"]
        if isinstance(known, dict) and known.get("entries") == len(self.data) > max(broken, default=0):
            self.data.broken[broken] = True

    def say_changes(self, checkpoint: Content, path: str | Path, config: PretrainConfig) -> None:
        """Print in what this run differs from that of a checkpoint, whose phase has `config` now."""
        settings = {key: value for key, value in self.settings.items() if key != "entries" or config is self.config}
        if changed := runs.changes_since(checkpoint, config, settings):
            utils.log("\n  ".join([f"{path}: this run differs from the one that it goes on with", *changed]))

    def restore_processes(self, progress: Content, start: Position, log: TrainingLog) -> None:
        """Go on with the random numbers and the counts of the log, in the epoch that the run goes on in.

        Args:
            progress: of the checkpoint (`progress_of`).
            start: where the run goes on.
        """
        states, position = progress["processes"], (progress["epoch"], progress["step"], progress["samples"])
        same = len(states) == utils.world_size() and position == (*start, start.step * self.step_samples)
        try:
            log.restore([state["log"] for state in states], utils.rank() if same else None)
            if same:
                restore_random_state(states[utils.rank()]["random"], self.device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"the checkpoint's 'progress' is damaged ({error}); resume from the one before"
            ) from error


def settings_of(args: argparse.Namespace, entries: int) -> Content:
    """What decides a run's numbers, beside its config."""
    return {
        "seed": args.seed,
        "world_size": utils.world_size(),
        "accum_steps": args.accum_steps,
        "precision": args.precision,
        "grad_clip": args.grad_clip,
        "entries": entries,
    }


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
    return utils.gather_objects(chosen)[0]


def read_start(path: str | Path) -> Content:
    """The content of a checkpoint; raises `CheckpointError` if some processes do not see it (a collective call)."""
    lacking = utils.gather_objects("" if Path(path).exists() else platform.node())
    if any(lacking) and not all(lacking):
        which = ", ".join(f"process {rank} on {node}" for rank, node in enumerate(lacking) if node)
        raise CheckpointError(f"{path}: not seen by {which}; all processes need the same files: share the folder")
    return read_checkpoint(path)


def phases_left(phases: list[Phase], path: str | Path, goes_on: bool) -> list[Phase]:
    """The phases that a run comes to from its start (`choose_start`); the last one even if nothing of it is left."""
    if not goes_on or len(phases) == 1:
        return phases
    checkpoint = read_start(path)
    check_resumable(checkpoint, path)
    epoch = progress_of(checkpoint, path)["epoch"]
    return [phase for phase in phases if epoch < phase.epochs.stop] or phases[-1:]


def earlier_steps(checkpoint: Content, phase: Phase, epoch_steps: int) -> int:
    """The optimizer steps of all epochs before a phase, by the log in a checkpoint; else, each has `epoch_steps`."""
    log = checkpoint.get("log")
    rows = [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []
    known = {row["epoch"]: row["steps"] for row in rows if type(row.get("epoch")) is type(row.get("steps")) is int}
    return sum(known.get(epoch, epoch_steps) for epoch in range(phase.epochs.start))


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
        indices of entries whose images could not be read; "processes": the state of each.

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


def position_after(progress: Content, step_samples: int, epoch_steps: int) -> Position:
    """Where to go on: after the samples that are done, also with another number of them in a step.

    What is left of a step that the earlier run had begun to count otherwise is left out.

    Args:
        step_samples: samples of one optimizer step, over all processes.
        epoch_steps: optimizer steps of an epoch.
    """
    return Position(progress["epoch"], min(-(-progress["samples"] // step_samples), epoch_steps))


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


def load_start(
    model: PretrainModel, config: PretrainConfig, args: argparse.Namespace, path: str | Path
) -> dict[str, Any]:
    """Load the weights to start from, a checkpoint's or those of other models; returns the checkpoint, {} for none."""
    if not path:
        if config.vit_init:
            utils.log(str(init_image_encoder(model.visual_encoder, config.vit_init)))
        if config.model == "blip":
            utils.log("without a --checkpoint, all weights of BLIP are random")
        else:
            utils.log(str(init_text_encoder(model.text_encoder, args.text_encoder)))
        model.copy_teacher()
        return {}
    if config.model == "blip" and is_student(Path(path)):
        check_same_blip(config.bert_config, Path(path) / CONFIG)
    checkpoint = read_start(path)
    utils.log(str(load_weights(model, checkpoint["model"], path)))
    return checkpoint


def way_back(output: Path, before: Position, inclusive: bool) -> str:
    """Advice for a run that has diverged: the last checkpoint before a position, or of it, whose weights are sound."""
    for at, path in reversed(runs.checkpoints(output).items()):
        with contextlib.suppress(CheckpointError):
            if (at < before or (inclusive and at == before)) and not diverged(read_checkpoint(path)["model"]):
                return f"{path} is intact: --resume --checkpoint {path} with a lower optimizer.lr, or --precision fp32"
    return f"{output} holds no sound checkpoint: start anew with a lower optimizer.lr, or --precision fp32"


def command_to_go_on() -> str:
    """The command that continues this run; of a group on several machines, the part of one of them."""
    count = os.environ.get("LOCAL_WORLD_SIZE", utils.world_size())
    launcher = f"torchrun --nproc_per_node={count}" if utils.world_size() > 1 else "python"
    return f"{launcher} {shlex.join(sys.argv)}" + ("" if "auto" in sys.argv else " --resume auto")
