"""Processes, devices, seeds, meters and safe writing: the small things every program here needs."""

import argparse
import base64
import contextlib
import ctypes
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can put right: a config, a file, an option. Programs print it without a traceback."""


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a program: a `UserError` becomes one message and exit status 1; the process group is left in any case."""
    try:
        main(args)
    except UserError as error:
        # A loader's worker wraps the message in its traceback; the message is what comes last.
        text = str(error)
        text = text.rpartition("Error: ")[2] if "Original Traceback" in text else text
        sys.exit(f"error: {text.strip()}")
    finally:
        shutdown_distributed()


# ---- processes


def init_distributed(device: torch.device, dist_url: str = "env://") -> None:
    """Join the process group that torchrun or torch.distributed.launch set up; without one, stay a single process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=dist_url, timeout=datetime.timedelta(minutes=60))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def shutdown_distributed() -> None:
    """Leave the process group at a program's end, as NCCL asks for; Gloo's connections end with the process.

    PyTorch 2.4 now and then never returns from destroying a Gloo group while the other process does the same.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of equal shape from all processes along dim 0, in rank order; no gradient flows."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gather_objects(item: T) -> list[T]:
    """Each process's item, in rank order, on all of them; for small things on the CPU."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def log(message: str) -> None:
    """Print, from rank 0 only."""
    if rank() == 0:
        print(message, flush=True)


# ---- command line


def boolean(text: str) -> bool:
    """A true boolean for argparse: `--resume False` means False."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return known[text.lower()]


def integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    """An integer from low to high, for argparse."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            upper = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{upper}, not {value}")
        return value

    parse.__name__ = "integer"  # for argparse's message about what is no integer
    return parse


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or else the GPU if there is one (this process's, by its local rank) and the CPU if not.

    Raises:
        UserError: a GPU is asked for where there is none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and int(os.environ.get("RANK", 0)) == 0:
            print("No GPU found: running on the CPU.", flush=True)
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no CUDA device that PyTorch can use; try --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and PyTorch from a key such as (seed, rank, epoch)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    random.seed(int(state))
    np.random.seed(int(state % 2**32))  # noqa: NPY002 - libraries may draw from the global generator
    torch.manual_seed(int(state))


def return_freed_memory(least: int = 2**19) -> bool:
    """Let freed blocks of `least` bytes or more go back to the system at once, where the C library is glibc.

    glibc keeps freed blocks of up to 32 MB for itself, and the tensors of a training step come in so many sizes that
    much of what it keeps fits nothing. Asking the system anew for every block takes time: worth it where memory is
    scarce.

    Returns:
        whether the C library took the setting.
    """
    mmap_threshold = -3  # mallopt's number for it
    try:
        return bool(ctypes.CDLL(None).mallopt(mmap_threshold, least))
    except (AttributeError, OSError, TypeError):  # another C library
        return False


# ---- meters


class Meters:
    """Running means of named scalars, kept on their device, so that counting a step does not wait for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def update(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            total = self.sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=value.device))
            total += value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def local_averages(self) -> dict[str, float]:
        """Means over this process's updates; waits for the device."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def averages(self) -> dict[str, float]:
        """Means over the updates of all processes, equally often updated (a collective call)."""
        means = self.local_averages()
        if world_size() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            packed = torch.tensor(list(means.values()), dtype=torch.float64, device=device)
            dist.all_reduce(packed)
            means = dict(zip(means, (packed / world_size()).tolist(), strict=True))
        return means


# ---- text and files


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines of columns: the first `left` of a row flush left, the others right; rows may be short."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=False)
        padded = (cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | Path) -> Any:
    """`torch.load` onto the CPU that runs no code from the file; a file in the zip format is mapped, not read.

    PyTorch before 2.6 hands the archives of torch.jit.save to TorchScript even with weights_only=True
    (CVE-2025-32434), and unpacks those of its early .tar format: neither holds a checkpoint.

    Raises:
        ValueError: it is one of these.
        OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, pickle.UnpicklingError: it cannot be read.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped and tarfile.is_tarfile(path):
        raise ValueError("a .tar archive")
    if zipped and "constants.pkl" in {Path(name).name for name in _names_in_zip(path)}:
        raise ValueError("a TorchScript program")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _names_in_zip(path: str | Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError("a zip archive that is cut off or damaged") from error


def file_digest(path: str) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def shortest_ends(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells all of them apart; all of it where nothing does."""
    longest = max((len(path.parts) for path in paths), default=0)
    ends: list[str] = []
    for count in range(1, longest + 1):
        ends = [str(Path(*path.parts[-count:])) for path in paths]
        if len(set(ends)) == len(ends):
            break
    return ends


def data_uri(kind: str, content: bytes) -> str:
    """A file's content as an address, for a page that needs no other file; `kind` is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.txt, one JSON object each; a line cut off by an interruption is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


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
        "world_size": world_size(),
        "python": sys.version.split()[0],
        "versions": versions,
        "git_commit": _git_commit(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
    }
    write_text(path, json.dumps(record, indent=2) + "\n")


def _git_commit() -> str | None:
    here = Path(__file__).parent
    with contextlib.suppress(OSError):
        found = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
        return found.stdout.strip() or None
    return None
