"""What it takes to know a checkpoint by its content, and to read it with its checksums compared.

    python benchmarks/bench_checkpoint.py [--gigabytes 3.5] [--folder /tmp]

Writes a file of random tensors and takes turns: the hash that evaluation knows it by, reading it, and PyTorch's own
reading, which compares no checksums. --cold drops the file from the system's cache before each (needs Linux).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import Clock, describe_machine
from files import file_digest, load_tensors, save_tensors

ROUNDS = 3


def forget(path: Path) -> None:
    """Let the system drop a file from its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "checkpoint_00.pth"
        tensors = {str(number): torch.randn(25_000_000) for number in range(round(args.gigabytes * 10))}
        clock = Clock()
        with clock.measure("write"):
            save_tensors(path, {"model": tensors})
        del tensors
        for _ in range(ROUNDS):
            for label, read in (
                ("hash of the content", lambda: file_digest(path)),
                ("read, checksums compared", lambda: load_tensors(path)),
                ("PyTorch's reading alone", lambda: torch.load(path, weights_only=True, mmap=True)),
            ):
                if args.cold:
                    forget(path)
                with clock.measure(label):
                    read()
        print(f"{path.stat().st_size / 1e9:.2f} GB, {'cold' if args.cold else 'cached'}; {describe_machine()}")
        for label in clock.seconds:
            print(f"{label:26} {clock.median(label):6.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the content check of a checkpoint.")
    parser.add_argument("--gigabytes", type=float, default=3.5)
    parser.add_argument("--folder", default=None, help="where the file is written (default: the system's)")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the system's cache")
    main(parser.parse_args())
