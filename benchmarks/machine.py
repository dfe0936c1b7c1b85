"""What the benchmarks share: arguments, a clock, peak memory, the machine's description and Markdown tables."""

import argparse
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
GLIBC_KEEPS = 2**25  # freed blocks of up to so many bytes, unless told otherwise (`utils.return_freed_memory`)
T = TypeVar("T")


class Clock:
    """Seconds, and the peak of memory in GB, of what runs under each label, time after time."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, float] = {}

    @contextmanager
    def measure(self, label: str) -> Iterator[None]:
        with suppress(OSError):  # not on Linux: the peak is that of the whole run
            CLEAR_REFS.write_text("5")
        started = time.perf_counter()
        yield
        self.seconds.setdefault(label, []).append(time.perf_counter() - started)
        self.memory[label] = max(self.memory.get(label, 0.0), peak_memory())

    def in_turns(
        self, calls: Mapping[str, Callable[[], T]], rounds: int, before: Callable[[], object] = lambda: None
    ) -> dict[str, T]:
        """Measure each call once a round, so that a busy minute of the machine meets all; returns the last results.

        Args:
            before: done before each call, not measured.
        """
        results = {}
        for _ in range(rounds):
            for label, call in calls.items():
                before()
                with self.measure(label):
                    results[label] = call()
        return results

    def median(self, label: str, skip: int = 0) -> float:
        """The median of all times but the first `skip`."""
        return statistics.median(self.seconds[label][skip:])


def peak_memory() -> float:
    """The most memory in GB that this process has held, on Linux since `Clock.measure` began."""
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+)", STATUS.read_text())):
        return int(found[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def describe_machine() -> str:
    """Processor, cores, threads and PyTorch's version, as one line."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = found[1].strip() if found else platform.processor() or "unknown processor"
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with `text`, a program's docstring."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table: the first column flush left, the others right."""
    yield f"| {' | '.join(heads)} |".replace("|  |", "| |")
    yield "|---|" + "---:|" * (len(heads) - 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, each row as soon as it is known."""
    for line in markdown_table(heads, rows):
        print(line, flush=True)
