"""Processes, devices, seeds and safe writing: the small things every program here needs."""

import argparse
import contextlib
import ctypes
import datetime
import os
import platform
import random
import re
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, and not declared so
from torch.distributed.rendezvous import rendezvous

from system.errors import describe_os_error, explain
from system.failures import Watch, end
from terminal import Escaping, printable

T = TypeVar("T")

# What PyTorch says when another process of the group is gone.
LOST = re.compile(r"[Cc]onnection (was )?(closed|reset|refused)|Broken pipe|remote process|[Tt]im(ed |e)out|aborted")

PATIENCE = datetime.timedelta(minutes=60)  # for a process that others wait for


class AgreedExit(SystemExit):
    """All processes of the group end here, with one status; any other `SystemExit` is the failure of one of them."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class UserError(ValueError):
    """Something the user can put right: a config, a file, an option. Programs print it without a traceback."""


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a program. What the user can put right becomes one message and exit status 1; a fault of ours is raised.

    What files hold reaches the terminal escaped (`Escaping`). Of several processes, one that fails prints its message
    first, and then all end (system/failures.py).
    """
    try:
        with contextlib.redirect_stdout(Escaping(sys.stdout)), contextlib.redirect_stderr(Escaping(sys.stderr)):
            main(args)
        leave_group(0)
    except AgreedExit as end_of_all:
        leave_group(end_of_all.status)
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        message = _own_words(error) if isinstance(error, UserError) else explain(error, vars(args))
        if dist.is_initialized():
            fail(f"error: {message}" if message else traceback.format_exc(), error)
        if message is None:
            raise
        sys.exit(printable(f"error: {message}", sys.stderr))


def _own_words(error: UserError) -> str:
    """The message of an error, without the traceback that a loader's process wraps it in."""
    text = str(error)
    if "Original Traceback" in text:
        text = re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", text, flags=re.MULTILINE)[-1]
    return text.strip()


# ---- processes


def init_distributed(device: torch.device, dist_url: str = "env://") -> None:
    """Join the process group that torchrun or torch.distributed.launch set up; without one, stay a single process.

    Raises:
        UserError: the environment describes a group that cannot be joined.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    if dist_url == "env://" and "MASTER_ADDR" not in os.environ and os.environ["WORLD_SIZE"] == "1":
        return  # a cluster job's environment, and no launcher
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        own, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        shared = next(rendezvous(dist_url, own, count, timeout=PATIENCE))[0]
        if isinstance(shared, PrefixStore):  # PyTorch 2.4: by each host's own count of restarts
            shared = shared.underlying_store
        start = name_of_start(shared, own, count)
        store = PrefixStore(start, shared)
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=PATIENCE)
    except (dist.DistError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the process group cannot be joined ({reason}); --dist_url {dist_url}, {found}: start the program by "
            "torchrun, or pass --distributed false to run one process"
        ) from error

    if backend == "nccl":
        control: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        _group.control = control
    if isinstance(shared, TCPStore):
        _group.watch = Watch(shared.host, shared.port, f"{start}/failed")


def name_of_start(store: Store, own: int, count: int, patience: datetime.timedelta = PATIENCE) -> str:
    """A name on which the `count` processes of a group agree, and which no earlier start of the job had.

    torchrun's store outlives a restart: by the addresses that it holds from before, Gloo waits for processes that are
    gone. No variable of the environment tells two starts apart on all hosts (each host counts its own restarts). So
    each process asks under a name of its own, and process 0 answers whatever it finds asked, until all have their
    answer.

    Raises:
        dist.DistStoreError: the others have not come within `patience`.
    """
    name = f"amc/{uuid.uuid4().hex}"
    if own:
        store.set(f"amc/asked/{own}", name)
        name = store.get(name).decode()  # waits
        store.add(f"{name}/answered", 1)
        return name
    deadline = time.monotonic() + patience.total_seconds()
    while (answered := store.add(f"{name}/answered", 0)) < count - 1:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{count - 1 - answered} of {count} processes have not come within {patience}")
        for key in (f"amc/asked/{other}" for other in range(1, count)):
            if store.check([key]):
                store.set(store.get(key).decode(), name)
        time.sleep(0.05)
    return name


class _Group:
    """What belongs to this process's group: `control` carries small things on the CPU; None: the group itself does."""

    control: dist.ProcessGroup | None = None
    watch: Watch | None = None


_group = _Group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier(_group.control)


def leave_group(status: int) -> None:
    """End this process of a group, once all have come to their ends; without a group, do nothing.

    NCCL's group is destroyed, as NCCL asks for. The process ends without Python's own clearing up: there, a thread of
    Gloo that is still at work can abort it, and PyTorch 2.4 now and then never returns from destroying a Gloo group.
    """
    if not dist.is_initialized():
        return
    barrier()
    if _group.watch:
        _group.watch.close()
    if dist.get_backend() == "nccl":
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def fail(message: str, error: BaseException) -> NoReturn:
    """End all processes of the group because this one failed; its message comes first."""
    own = f"process {rank()} of {world_size()} on {platform.node()}"
    status = 1
    if isinstance(error, KeyboardInterrupt):
        message, status = "interrupted", 128 + signal.SIGINT
    lost = isinstance(error, RuntimeError) and LOST.search(str(error))
    first_line = str(error).strip().partition("\n")[0][:300]
    summary = f"{own} failed: {first_line or type(error).__name__}"
    if lost:  # what the failure of another looks like from here
        summary = f"{own} lost the connection to another one, which was killed or failed ({first_line})"
        message = f"{summary}; --resume auto goes on from the last checkpoint"
    else:
        message = f"{own}: {message}"
        with contextlib.suppress(OSError, ValueError):
            print(printable(message, sys.stderr), file=sys.stderr, flush=True)
    first = summary
    if _group.watch:
        with contextlib.suppress(RuntimeError):  # the store is gone
            first = _group.watch.tell(summary)
    if first != summary:
        end(printable(f"{own} ends: {first}", sys.stderr), status)
    end(printable(message, sys.stderr) if lost else "", status)


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of equal shape from all processes along dim 0, in rank order; no gradient flows."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def largest_of_all(values: list[int]) -> list[int]:
    """The largest of each value over all processes."""
    if world_size() == 1:
        return values
    packed = torch.tensor(values)
    dist.all_reduce(packed, dist.ReduceOp.MAX, _group.control)
    return packed.tolist()


def gather_objects(item: T) -> list[T]:
    """Each process's item, in rank order, on all of them; for small things on the CPU."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item, _group.control)
    return items


def on_rank_0(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on all ranks; a `UserError` is raised on all of them too."""
    found: T | UserError | None = None
    if rank() == 0:
        try:
            found = function()
        except UserError as error:
            found = error
    found = gather_objects(found)[0]
    if isinstance(found, UserError):
        raise found
    return found  # type: ignore[return-value]


def rows_on_rank_0(own: Tensor) -> Tensor:
    """The rows of all processes, in rank order, on rank 0; the others get their own back.

    They are sent as they are: as objects, 20,000 maps take seconds.

    Args:
        own: on the CPU, (n, ...), of one dtype and the same row everywhere; a process without rows may give any shape.
    """
    if world_size() == 1:
        return own
    shapes = gather_objects(tuple(own.shape))
    if rank() > 0:
        if len(own):
            dist.send(own.contiguous(), 0, _group.control)
        return own
    row = next((shape[1:] for shape in shapes if shape[0]), own.shape[1:])
    counts = [shape[0] for shape in shapes]
    rows = own.new_empty((sum(counts), *row))
    rows[: len(own)] = own.reshape(len(own), *row)
    for sender, part in list(enumerate(rows.split(counts)))[1:]:
        if len(part):
            dist.recv(part, sender, _group.control)
    return rows


def log(message: str) -> None:
    """Print, from rank 0 only."""
    if rank() == 0:
        print(message, flush=True)


# ---- device, seeds, memory


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or else the GPU if there is one (this process's, by its local rank) and the CPU if not.

    Raises:
        UserError: it is no device's name, or a GPU that is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and int(os.environ.get("RANK", 0)) == 0:
            print("No GPU found: running on the CPU.", flush=True)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: must be cpu, cuda, or one GPU as cuda:0")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no CUDA device that PyTorch can use; try --device cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= (count := torch.cuda.device_count()):
        raise UserError(
            f"--device {name}: GPU {index} is asked for, and PyTorch sees {count}; give a lower number, start no more "
            "processes than GPUs (--nproc_per_node), or check CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", index)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on the device, without waiting for what a GPU still computes."""
    if device.type == "cuda":  # only from pinned memory does a copy not wait
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and PyTorch from a key such as (seed, rank, epoch)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    random.seed(int(state))
    np.random.seed(int(state % 2**32))  # noqa: NPY002 - libraries may draw from the global generator
    torch.manual_seed(int(state))


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for the next step or image, where the C library is glibc.

    By default glibc gives back what is free at the end of its heap, and the system hands it out again page by page: 7%
    of a training step on the CPU (docs/performance.md). The most memory that the process needs hardly changes.
    """
    _set_thresholds(mmap=2**25, trim=-1)  # 32 MB: glibc accepts no more; -1: never


def return_freed_memory(least: int = 2**19) -> None:
    """Let freed blocks of `least` bytes or more go back to the system at once, where the C library is glibc.

    glibc keeps freed blocks of up to 32 MB for itself, and the tensors of a training step come in so many sizes that
    much of what it keeps fits nothing. Asking the system anew for every block takes time: worth it where memory is
    scarce.
    """
    _set_thresholds(mmap=least, trim=2 * least)  # glibc's own ratio


def _set_thresholds(mmap: int, trim: int) -> None:
    """glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes (mallopt(3))."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, mmap)
        libc.mallopt(-1, trim)


# ---- files


@contextlib.contextmanager
def atomic_path(path: str | Path, needed: int | None = None) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well: a reader never sees half a file.

    The name holds process and host, for `sweep`.

    Args:
        needed: bytes that will be written, if that is known; for the message when the disk is full.

    Raises:
        UserError: the file cannot be written; nothing of it is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        own = error.filename in (None, str(temporary), str(path), str(path.parent))  # else of what the block reads
        if error.errno is None or not own:
            raise
        raise UserError(describe_os_error(error, path, needed)) from error
    finally:
        with contextlib.suppress(OSError):  # of a folder that could not be made
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files of `atomic_path` in a folder whose process is gone, and say so.

    A file of another host is removed once it is a day old.
    """
    for path in list(folder.glob(".*.tmp")):
        name = re.fullmatch(r"\..+\.([0-9]{1,9})@(.+)\.tmp", path.name)
        if name is None or not path.is_file():
            continue
        known = path.stat()
        if time.time() - known.st_mtime > 86400 or (name[2] == platform.node() and _is_gone(int(name[1]))):
            path.unlink(missing_ok=True)
            log(f"{path}: removed, {known.st_size / 1e6:.1f} MB that a killed process left half written")


def _is_gone(process: int) -> bool:
    if process == os.getpid():
        return True  # another one had the number before: this one is just beginning to write
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        # A lone surrogate, as Python reads a file name that is no UTF-8, is escaped: in JSON that is its own escape.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
