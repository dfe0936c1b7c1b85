"""What a run leaves, and reading it back: the lock on its folder, file names, newest checkpoint, logs, provenance."""

import contextlib
import datetime
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

import utils
from config import PretrainConfig
from system.errors import describe_os_error

EPOCHS_LOG, STEPS_LOG, BOARD, LOCK, BEST = "log.txt", "steps.jsonl", "tensorboard", ".lock", "best.pth"
WANDB = "wandb"  # the folder of wandb's own files, and of the id of the run
Row = dict[str, Any]
Rows = list[Row]


class RunError(utils.UserError):
    """A run's folder that cannot be used: another process has it, or it has no logs that could be drawn."""


# ---- the lock


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes for as long as the block, or this process, lives.

    All ranks call it together; rank 0 holds the lock, and removes what killed processes left half written. A folder
    that was not there before, and in which nothing is left, goes again.

    Raises:
        RunError: another process has the folder, which the message names; or it cannot be written to.
    """
    lock, refusal = None, ""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    if utils.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder / LOCK)
        except RunError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"--output_dir {folder}: cannot be written to ({error.strerror})"
    if refusal := utils.gather_objects(refusal)[0]:
        raise RunError(refusal)
    try:
        if lock is not None:
            for written in (folder, folder / "result"):
                utils.sweep(written)
        yield
    finally:
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(lock)
        if utils.rank() == 0:
            with contextlib.suppress(OSError):  # where something was left in it
                for each in made:
                    each.rmdir()


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock at `path`; None, with a word, where the file system has no locks.

    It is a lock of the process: a loader's worker that outlives its killed parent does not keep it.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:
                owner = f"process {os.getpid()} on {platform.node()} ({shlex.join(sys.argv)[:300]})"
                os.ftruncate(lock, 0)
                os.write(lock, owner.encode(errors="replace"))
                return lock
            os.close(lock)  # its last owner removed the file meanwhile: try the next one
        except (BlockingIOError, PermissionError):
            text = os.read(lock, 4096).decode(errors="replace") or "another process"
            os.close(lock)
            owner = "".join(letter if letter.isprintable() else "?" for letter in text)
            raise RunError(
                f"{path.parent} is in use by {owner}: wait until it has ended, or choose another --output_dir"
            ) from None
        except OSError as error:  # some network file systems
            os.close(lock)
            utils.log(f"{path.parent} cannot be locked ({error.strerror}): start no second run in it")
            return None


# ---- checkpoints


class Position(NamedTuple):
    """Where a run stands: `step` optimizer steps of `epoch` are done. Of an epoch that is done, the next one's 0."""

    epoch: int
    step: int = 0


BEGINNING = Position(0)
NAME = re.compile(r"checkpoint_(?:relation_)?([0-9]+)(?:_step_([0-9]+))?\.pth")


def checkpoint_path(folder: Path, at: Position, phase: str = "") -> Path:
    """checkpoint_01.pth at the end of epoch 1, checkpoint_01_step_000200.pth within it; with a phase's name in it."""
    kind = f"checkpoint_{phase}" if phase else "checkpoint"
    if at.step:
        return folder / f"{kind}_{at.epoch:02d}_step_{at.step:06d}.pth"
    return folder / f"{kind}_{at.epoch - 1:02d}.pth"


def checkpoints(folder: Path) -> dict[Position, Path]:
    """The checkpoints in a training run's folder, in order; not a user's copies such as checkpoint_best.pth."""
    found = {}
    for path in folder.glob("checkpoint_*.pth"):
        if (name := NAME.fullmatch(path.name)) and path.is_file():
            epoch, step = int(name[1]), int(name[2] or 0)
            found[Position(epoch, step) if name[2] else Position(epoch + 1)] = path
    return dict(sorted(found.items()))


def is_within_epoch(path: Path) -> bool:
    """Whether a checkpoint's name says that it was saved within an epoch."""
    name = NAME.fullmatch(path.name)
    return name is not None and name[2] is not None


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in a training run's folder, if there is any."""
    return next(reversed(checkpoints(folder).values()), None)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that best.pth is a link to."""
    link = folder / BEST
    return folder / Path(os.readlink(link)).name if link.is_symlink() else None


def link_best(folder: Path, rows: Rows, key: str) -> None:
    """Let best.pth be a link to the checkpoint of the epoch whose row of log.txt has the highest `key`.

    The first of equals, of the epochs whose checkpoints are there. A file system without links is told, and no error.
    """
    found, link = checkpoints(folder), folder / BEST
    measured = (row for row in rows if isinstance(row.get(key), float) and isinstance(row.get("epoch"), int))
    values = {at: row[key] for row in measured if (at := Position(row["epoch"] + 1)) in found}
    best = max(values, key=lambda at: values[at], default=None)
    if best is None or found[best] == best_checkpoint(folder):
        return
    try:
        if link.exists() and not link.is_symlink():
            raise RunError(f"{link} is a file of its own, and stays: rename it, so that the link can be made")
        with utils.atomic_path(link) as temporary:
            temporary.symlink_to(found[best].name)
        utils.log(f"{link} is now {found[best].name}, {key} {100 * values[best]:.2f}%")
    except utils.UserError as error:
        utils.log(f"warning: {error}")


def changes_since(before: Row, config: PretrainConfig, settings: Row) -> list[str]:
    """How a run differs from the one whose checkpoint it continues, in lines "key: old -> new".

    Args:
        before: the checkpoint's content.
        settings: what decides the run's numbers beside its config; `before` may have it under "run".
    """
    stored = before.get("config")
    with contextlib.suppress(ValidationError):  # with the defaults of keys that are newer than the file
        stored = PretrainConfig.model_validate(stored).model_dump(mode="json")
    known = {**_as_text(stored), **_as_text(before.get("run"))}
    now = {**_as_text(config.model_dump(mode="json")), **_as_text(settings)}
    lines = [f"{key}: {known[key]} -> {now[key]}" for key in now if key in known and known[key] != now[key]]
    unknown = [key for key in now if key not in known]
    return lines + ([f"the checkpoint does not say its {', '.join(unknown)}"] if unknown else [])


def _as_text(values: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as JSON; of anything but a dict, nothing."""
    found: dict[str, str] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            found |= _as_text(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value, default=str)
    return found


# ---- the folder of a training run


def prepare_output(output: Path, start: Position, known: Any = None) -> None:
    """Make the folder ready for a run that begins at `start`.

    Logs lose the lines of what is to come. Files of an earlier run, and checkpoints of later positions, move to
    `earlier_N/`.

    Args:
        known: rows of log.txt that the checkpoint to go on from holds; those that the file lacks are written back.
    """
    output.mkdir(parents=True, exist_ok=True)
    if start == BEGINNING:
        own = ("checkpoint_*.pth", EPOCHS_LOG, STEPS_LOG, BOARD, WANDB, "config.yaml", "run.json")
        earlier = [path for pattern in own for path in output.glob(pattern)]
    else:
        earlier = [path for at, path in checkpoints(output).items() if at > start]
    best = best_checkpoint(output)
    if best and (start == BEGINNING or best in earlier):  # a link may lead nowhere
        earlier.append(output / BEST)
    if earlier:
        taken = [re.fullmatch(r"earlier_([0-9]+)", path.name) for path in output.glob("earlier_*")]
        aside = output / f"earlier_{max((int(name[1]) for name in taken if name), default=0) + 1}"
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        place = f"step {start.step} of epoch {start.epoch}"
        later = f"checkpoints from after {place}" if start.step else f"checkpoints of epoch {start.epoch} and later"
        what = "an earlier run" if start == BEGINNING else later
        utils.log(f"{output} holds {what}, which {'is' if start == BEGINNING else 'are'} now in {aside}")
    for path in (output / EPOCHS_LOG, output / STEPS_LOG):
        kept = [row for row in read_log(path, _with_place) if _is_before(row, start)]
        if path.name == EPOCHS_LOG and path.is_file() and isinstance(known, list):
            for row in known:
                wanted = row.get("epoch") if isinstance(row, dict) else None
                if wanted in range(start.epoch) and all(other["epoch"] != wanted for other in kept):
                    utils.log(f"{path}: the line of epoch {wanted} was lost; restored from the checkpoint")
                    kept.append(row)
            kept.sort(key=lambda row: row["epoch"])
        utils.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def timeless_log(output: Path) -> Rows:
    """The rows of log.txt without their seconds, for the checkpoint: equal runs leave equal files."""
    return [{key: row[key] for key in row if key != "seconds"} for row in read_log(output / EPOCHS_LOG)]


class Logs:
    """Appends to the logs of a run's folder. Lines that cannot be written, as on a full disk, wait for the next one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: dict[str, str] = {}
        self.failure: utils.UserError | None = None

    def append(self, name: str, row: Row) -> None:
        self.waiting[name] = self.waiting.get(name, "") + json.dumps(row) + "\n"
        self.write()

    def write(self) -> None:
        """Write what waits; says once why that cannot be done."""
        before, self.failure = self.failure, None
        for name, text in list(self.waiting.items()):
            try:
                _append(self.folder / name, text)
                del self.waiting[name]
            except OSError as error:
                self.failure = utils.UserError(describe_os_error(error, self.folder / name))
        if self.failure and not before:
            utils.log(f"warning: {self.failure}\n  training goes on, and its lines wait")

    def finish(self) -> None:
        """Write what waits; raises `UserError` where that cannot be done."""
        self.write()
        if self.failure:
            raise self.failure


def _append(path: Path, text: str) -> None:
    """Append all of a text to a file, or nothing of it; and have it on the disk, before a checkpoint that follows."""
    with path.open("ab", buffering=0) as file:
        length = file.tell()
        try:
            left = text.encode()
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(length)
            raise


def _with_place(row: Row) -> Row:
    return row | _whole(row, *(key for key in ("epoch", "step") if key in row))


def _is_before(row: Row, start: Position) -> bool:
    """Whether a line of a log, of an epoch or up to a step of it, tells only of what was done before `start`."""
    if "epoch" not in row:
        return False
    return row["epoch"] < start.epoch or (row["epoch"] == start.epoch and row.get("step", math.inf) < start.step)


# ---- logs


def read_log(path: Path, convert: Callable[[Row], Row] = dict) -> Rows:
    """The lines of a log, one JSON object each; says once which lines are none, and leaves them out.

    Args:
        convert: what to make of a row; a TypeError, ValueError or OverflowError says that it is no row of this log.
    """
    rows, bad = [], []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line.decode("utf-8-sig")) if line.strip() else {}
            if not isinstance(row, dict) or any(isinstance(value, (list, dict)) for value in row.values()):
                raise TypeError("not an object of plain values")
            rows.append(convert(row))
        except (TypeError, ValueError, OverflowError, RecursionError):
            bad.append(number)
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        _say(f"{path}: line {bad[0]}{more} is left out: cut off, or no JSON object with the values of this log")
    return [row for row in rows if row]


@functools.cache
def _say(message: str) -> None:
    """Once: a log is read more often than that."""
    utils.log(message)


# ---- curves


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
    for unit in ("steps", "epochs"):
        in_steps = unit == "steps"
        found = {
            name: (_step_rows(path) if in_steps and not by_epoch else []) or _epoch_rows(path, in_steps)
            for name, path in names.items()
        }
        if all(found.values()):
            return found, unit
    bad = next(path for name, path in names.items() if not found[name])
    wanted = EPOCHS_LOG if _step_rows(bad) else f"{STEPS_LOG} or {EPOCHS_LOG}"
    raise RunError(f"{bad}: no {wanted} of a training run with losses in it; give --output_dir of Pretrain.py")


def run_names(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each of the different runs: its folder's, with as many folders above it as tell all of them apart."""
    different = {Path(os.path.abspath(path)): path for path in paths}
    names = shortest_ends([full.parent if full.is_file() else full for full in different])
    if len(set(names)) < len(names):  # two logs of one folder
        names = [str(path) for path in different.values()]
    return dict(zip(names, different.values(), strict=True))


def shortest_ends(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells all of them apart; all of it where nothing does."""
    ends: list[str] = []
    for count in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        ends = [str(Path(*path.parts[-count:])) for path in paths]
        if len(set(ends)) == len(ends):
            break
    return ends


def _step_rows(path: Path) -> Rows:
    """The rows of steps.jsonl."""

    def convert(row: Row) -> Row:
        losses = {key: float(row[key]) for key in row if key.startswith("loss_")}
        return {**row, **losses, **_whole(row, "epoch", "step")} if "step" in row and "epoch" in row else {}

    return read_log(path / STEPS_LOG if path.is_dir() else path, convert)


def _epoch_rows(path: Path, in_steps: bool) -> Rows:
    """The rows of log.txt in the form of steps.jsonl; `in_steps`: those that tell their number of steps."""

    def convert(row: Row) -> Row:
        # the release writes the numbers as strings
        losses = {key.removeprefix("train_"): float(row[key]) for key in row if key.startswith("train_loss_")}
        if not losses or "epoch" not in row or ("steps" not in row and in_steps):
            return {}
        length = _whole(row, "steps")["steps"] if in_steps else 1
        return {**_whole(row, "epoch"), "step": length - 1, **losses}

    return read_log(path / EPOCHS_LOG if path.is_dir() else path, convert)


def _whole(row: Row, *keys: str) -> dict[str, int]:
    return {key: int(float(row[key])) for key in keys}


# ---- provenance


def write_provenance(path: Path, seed: int, **more: Any) -> None:
    """Leave command, versions, git commit and seed beside a run's results."""
    libraries = ["torch", "torchvision", "timm", "transformers", "numpy"]
    libraries += ["opencv-python", "opencv-python-headless", "pillow"]
    versions = {}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    record = {
        "command": sys.argv,
        "seed": seed,
        "world_size": utils.world_size(),
        "python": sys.version.split()[0],
        "versions": versions,
        "git_commit": git_commit(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
    }
    utils.write_text(path, json.dumps(record, indent=2) + "\n")


def git_commit() -> str | None:
    here = Path(__file__).parent
    with contextlib.suppress(OSError):
        found = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
        return found.stdout.strip() or None
    return None
