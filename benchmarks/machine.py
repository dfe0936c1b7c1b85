"""What the benchmarks share: a clock, the memory that was needed at most, and what the machine is."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class Clock:
    """Seconds, and the peak of memory in GB, of what runs under each label, time after time."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, float] = {}

    @contextmanager
    def measure(self, label: str) -> Iterator[None]:
        reset_peak_memory()
        started = time.perf_counter()
        yield
        self.seconds.setdefault(label, []).append(time.perf_counter() - started)
        self.memory[label] = max(self.memory.get(label, 0.0), peak_memory())

    def median(self, label: str, skip: int = 0) -> float:
        """Over all times but the first `skip`."""
        return statistics.median(self.seconds[label][skip:])


def describe_machine() -> str:
    """Processor, cores, threads and PyTorch's version, as one line."""
    model = platform.processor() or "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def reset_peak_memory() -> None:
    """Start to count anew, where the system can (Linux); elsewhere `peak_memory` is of the whole run."""
    with suppress(OSError):
        CLEAR_REFS.write_text("5")


def peak_memory() -> float:
    """The most memory this process has held since `reset_peak_memory`, in GB."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
