"""Training runs read back for their curves: steps.jsonl (every 20 steps) or log.txt (every epoch) of Pretrain.py."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils

EPOCHS_LOG, STEPS_LOG = "log.txt", "steps.jsonl"
Rows = list[dict[str, Any]]


class RunError(utils.UserError):
    """A training run without logs that could be drawn."""


def read_runs(paths: Sequence[Path], by_epoch: bool = False) -> tuple[dict[str, Rows], str]:
    """The losses of each run as rows of steps.jsonl, {"epoch", "step", "loss_<name>"}, and what a step is.

    Steps are counted where every run can be counted so: by its steps.jsonl, or by a log.txt that tells the steps of its
    epochs. Otherwise, as with the release's log.txt, a "step" is an epoch, of all runs.

    Args:
        paths: folders of runs, or one of these two files of each.
        by_epoch: read log.txt even where there is steps.jsonl.

    Returns:
        rows by the run's name, in order; "steps" or "epochs".

    Raises:
        RunError: a run has none of the two files, or none that is needed.
    """
    names = run_names(paths)
    found = {}
    for name, path in names.items():
        found[name] = ([] if by_epoch else _step_rows(path)) or _epoch_rows(path, in_steps=True)
    if all(found.values()):
        return found, "steps"
    rows = {name: _epoch_rows(path, in_steps=False) for name, path in names.items()}
    for name, path in names.items():
        if not rows[name]:
            wanted = EPOCHS_LOG if _step_rows(path) else f"{STEPS_LOG} or {EPOCHS_LOG}"
            raise RunError(f"{path}: no {wanted} of a training run with losses in it; give --output_dir of Pretrain.py")
    return rows, "epochs"


def run_names(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each of the different runs: its folder's, with as many folders above it as tell all of them apart."""
    different = {Path(os.path.abspath(path)): path for path in paths}
    names = utils.shortest_ends([full.parent if full.is_file() else full for full in different])
    if len(set(names)) < len(names):  # two logs of one folder
        names = [str(path) for path in different.values()]
    return dict(zip(names, different.values(), strict=True))


def _step_rows(path: Path) -> Rows:
    """The rows of steps.jsonl."""
    file = path / STEPS_LOG if path.is_dir() else path
    return [row for row in utils.read_log(file) if "step" in row and "epoch" in row]


def _epoch_rows(path: Path, in_steps: bool) -> Rows:
    """The rows of log.txt in the form of steps.jsonl; `in_steps`: those that tell their number of steps."""
    file = path / EPOCHS_LOG if path.is_dir() else path
    rows = []
    for row in utils.read_log(file):
        losses = {key.removeprefix("train_"): row[key] for key in row if key.startswith("train_loss_")}
        if losses and "epoch" in row and ("steps" in row or not in_steps):
            length = int(row["steps"]) if in_steps else 1
            numbers = {name: float(value) for name, value in losses.items()}  # the release writes them as strings
            rows.append({"epoch": row["epoch"], "step": length - 1, **numbers})
    return rows
