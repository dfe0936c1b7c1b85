"""What the benchmarks share: arguments, a clock, peak memory, FLOP, the machine's description and Markdown tables."""

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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import precision
from benchmarks.counts import Counts

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
LAUNCH = re.compile(r"cu(da)?(Graph)?Launch")  # what CUDA's calls are named in a profile
WAIT = re.compile(r"cuda(Stream|Event)Synchronize|cudaMemcpy$")  # the profiler itself ends with cudaDeviceSynchronize
CPU = torch.device("cpu")
T = TypeVar("T")

# TFLOP/s of dense matrix products that accumulate in fp32, as the makers state them at the boost clock: by a part of
# the device's name, of which the first that fits counts, and by precision. What is missing, the device lacks.
PEAKS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756},
    "H100 NVL": {"fp32": 60, "tf32": 417, "bf16": 835, "fp16": 835},
    "H100": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989},  # SXM
    "H200": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
    "L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165, "fp16": 165},
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71, "fp16": 71},
    "V100": {"fp32": 15.7, "fp16": 125},
    "T4": {"fp32": 8.1, "fp16": 65},
}


class Clock:
    """Seconds, and the peak of memory in GB, of what runs under each label, time after time.

    On a GPU, the time runs until the device has done all that it was given, and the memory is that of the tensors.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, float] = {}

    @contextmanager
    def measure(self, label: str) -> Iterator[None]:
        with suppress(OSError):  # not on Linux: the peak is that of the whole run
            CLEAR_REFS.write_text("5")
        synchronise(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds.setdefault(label, []).append(time.perf_counter() - started)
        self.memory[label] = max(self.memory.get(label, 0.0), peak_memory(self.device))

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


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device = CPU) -> float:
    """The most memory in GB since `Clock.measure` began: of tensors on a GPU, of this process on the CPU.

    On the CPU, anywhere but on Linux, it is the most since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+)", STATUS.read_text())):
        return int(found[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def count_flop(call: Callable[[], object]) -> int:
    """FLOP of the matrix products and convolutions of a call and of its gradients; nothing else is counted.

    Attention counts as its products written out, so that what a fused kernel computes again counts once.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count_launches(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """What a call asks of the device: kernels launched, and times that the host waits for their results.

    On a GPU, CUDA's own calls as the profiler sees them. On the CPU, which has neither, the operators that launch one
    or more kernels on a GPU, or wait there (`counts.Counts`); in compiled code they cannot be told.
    """
    if device.type == "cpu":
        with Counts() as counts:
            call()
        return counts.launches.total(), counts.waits.total()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        synchronise(device)
    return launches_and_waits(event.name for event in found.events() or ())


def launches_and_waits(names: Iterable[str]) -> tuple[int, int]:
    """How many of CUDA's calls launch something, and how many wait for the device."""
    known = list(names)
    return sum(bool(LAUNCH.match(name)) for name in known), sum(bool(WAIT.match(name)) for name in known)


def share_of_peak(flop: float, seconds: float, name: str, kind: str, tflops: float | None) -> str:
    """How much of a device's peak so many FLOP in so many seconds are, as text; "-" where the peak is not known.

    Args:
        name: the device's.
        kind: the precision.
        tflops: the peak, in TFLOP/s, instead of the one of `PEAKS`.
    """
    tflops = tflops or next((known.get(kind) for part, known in PEAKS.items() if part in name), None)
    return f"{100 * flop / seconds / 1e12 / tflops:.1f}%" if tflops else "-"


def write_trace(call: Callable[[], object], device: torch.device, folder: Path, label: str) -> Path:
    """Write a trace of a call's operators and kernels, for chrome://tracing or Perfetto; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '_', label.lower())}.json"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        call()
        synchronise(device)
    found.export_chrome_trace(str(path))
    return path


def device_name(device: torch.device) -> str:
    """As its maker calls it; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def describe_machine(device: torch.device = CPU) -> str:
    """Processor, cores, threads and PyTorch's version, and a GPU with its memory, as one line."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = found[1].strip() if found else platform.processor() or "unknown processor"
    cpu = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    if device.type == "cpu":
        return cpu
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}; {cpu}"


def default_precisions(device: torch.device) -> list[str]:
    """What is worth measuring on a device, IEEE or nearest to it first."""
    if device.type == "cpu":
        return ["fp32", "bf16"]
    return ["tf32", "bf16"] if precision.has_tf32(device) else ["fp32", "fp16"]


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with `text`, a program's docstring."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def device_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser of what is measured on a GPU as well as on the CPU."""
    found = parser(text)
    found.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU (default: cpu)")
    found.add_argument("--quick", action="store_true", help="the small model of the scenes")
    what = "what to measure (default: fp32 bf16 on the CPU, tf32 bf16 on a GPU that has them, else fp32 fp16)"
    found.add_argument("--precisions", nargs="+", choices=precision.DTYPES, help=what)
    peak = "the device's peak, for its share (default: as the makers of known GPUs state it)"
    found.add_argument("--peak_tflops", type=float, metavar="TFLOP/s", help=peak)
    found.add_argument("--profile", type=Path, metavar="FOLDER", help="write traces of the profiler to this folder")
    return found


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
