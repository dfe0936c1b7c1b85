"""What it takes to know a checkpoint by its content, and to read it with its checksums compared.

    python benchmarks/bench_checkpoint.py [--gigabytes 3.5] [--folder /tmp] [--cold]

Writes a file of random tensors and takes turns: the hash that evaluation knows it by, reading it, and PyTorch's own
reading, which compares no checksums.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import Clock, describe_machine, parser
from files import file_digest, load_tensors, save_tensors

ROUNDS = 3
READERS: dict[str, Callable[[Path], object]] = {
    "hash of the content": file_digest,
    "read, checksums compared": load_tensors,
    "PyTorch's reading alone": lambda path: torch.load(path, weights_only=True, mmap=True),
}


def forget(path: Path) -> None:
    """Let the system (Linux) drop a file from its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main(gigabytes: float, folder: str | None, cold: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path, clock = Path(place) / "checkpoint_00.pth", Clock()
        tensors = {str(number): torch.randn(25_000_000) for number in range(round(gigabytes * 10))}
        with clock.measure("write"):
            save_tensors(path, {"model": tensors})
        del tensors
        for _ in range(ROUNDS):
            for label, read in READERS.items():
                if cold:
                    forget(path)
                with clock.measure(label):
                    read(path)
        print(f"{path.stat().st_size / 1e9:.2f} GB, {'cold' if cold else 'cached'}; {describe_machine()}")
        for label in clock.seconds:
            print(f"{label:26} {clock.median(label):6.2f} s")


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--gigabytes", type=float, default=3.5)
    options.add_argument("--folder", help="where the file is written (default: the system's temporary folder)")
    options.add_argument("--cold", action="store_true", help="read from the disk, not from the system's cache")
    main(**vars(options.parse_args()))
