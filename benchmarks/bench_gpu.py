"""All that is worth an hour on a GPU, in one command: tests on the device, benchmarks, the scenes' demo; one report.

    python benchmarks/bench_gpu.py                        what `make bench-gpu` runs
    python benchmarks/bench_gpu.py --parts train eval     some of it
    python benchmarks/bench_gpu.py --device cpu --quick   a rehearsal of the program itself, with small models

In OUTPUT_DIR, report.md is Markdown to paste into docs/performance.md, written anew after each part: versions, device,
git commit, and of each part its command and what it printed. A part that fails, or takes longer than --limit minutes,
has its error there too; the others run all the same, and the exit status is 1. All output is in logs/.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import runs
import utils
from benchmarks.machine import describe_machine, markdown_table, parser

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "triton", "torchvision", "timm", "transformers", "numpy")
SHOWN_LINES = 60  # of output that is no table


class Part(NamedTuple):
    """Something to run.

    Args:
        words: of the command, after "python".
        quick: further words for --quick; without them there is nothing small to run.
        takes_device: whether it has a --device.
        markdown: its output is tables, and not lines for a terminal.
    """

    title: str
    words: list[str]
    quick: list[str]
    takes_device: bool = True
    markdown: bool = True


class Outcome(NamedTuple):
    """What came of a part: its command, minutes, what to show of its output, and what went wrong ("" for nothing)."""

    command: str
    minutes: float
    output: str
    problem: str


PARTS = {
    "tests": Part(
        "Tests on the device", ["-m", "pytest", "tests/test_on_gpu.py"], ["-m", "not golden"], False, markdown=False
    ),
    "train": Part("The training step", ["benchmarks/bench_train.py"], ["--quick"]),
    "eval": Part("Evaluation", ["benchmarks/bench_eval.py"], ["--quick", "--mixes", "refcoco"]),
    "data": Part("Loading", ["benchmarks/bench_data.py"], ["--quick"], False),
    "save": Part("Checkpoints", ["benchmarks/bench_save.py"], ["--config", "configs/scenes/Pretrain.yaml"], False),
    "demo": Part("The scenes' demo", ["scenes_demo.py"], [], markdown=False),
}


def main(args: argparse.Namespace) -> None:
    device = utils.choose_device(args.device)
    report, outcomes = args.output_dir / "report.md", dict[str, Outcome]()
    for name in args.parts:
        print(f"\n== {PARTS[name].title}", flush=True)
        outcomes[name] = run_part(name, args)
        print(f"   {outcomes[name].problem or 'done'}, {outcomes[name].minutes:.1f} minutes", flush=True)
        utils.write_text(report, write_report(outcomes, device))
    print(f"\n{report}: paste it into docs/performance.md, and say which numbers it replaces")
    if failed := [name for name, outcome in outcomes.items() if outcome.problem]:
        raise utils.UserError(f"{', '.join(failed)} failed; {report} and {args.output_dir / 'logs'} say why")


def run_part(name: str, args: argparse.Namespace) -> Outcome:
    """Run a part to its end or its limit; what it prints goes to the logs."""
    part = PARTS[name]
    words = [*part.words, *(part.quick if args.quick else [])]
    words += ["--device", args.device] if part.takes_device else []
    words += ["--output_dir", str(args.output_dir / "scenes")] if name == "demo" else []
    logs, started = args.output_dir / "logs", time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    printed, said = logs / f"{name}.txt", logs / f"{name}_errors.txt"
    problem = ""
    with printed.open("w") as out, said.open("w") as err:
        environment = {**os.environ, "TEST_DEVICE": args.device}
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=err, **options)
        try:
            if status := process.wait(60 * args.limit):
                problem = f"exit status {status}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {args.limit:g} minutes"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started holds the GPU as well
            process.wait()
    output = printed.read_text(errors="replace").strip()
    if not part.markdown:
        output = fenced(output)
    if problem:
        output += f"\n\n{problem}:\n\n{fenced(said.read_text(errors='replace').strip())}"
    return Outcome(f"python {' '.join(words)}", (time.monotonic() - started) / 60, output, problem)


def fenced(text: str) -> str:
    """The end of a text, as it is."""
    return "\n".join(["```text", *text.splitlines()[-SHOWN_LINES:], "```"])


def write_report(outcomes: dict[str, Outcome], device: torch.device) -> str:
    """What is known so far, as Markdown."""
    found = {name: version for name in LIBRARIES if (version := installed(name))}
    versions = [f"Python {platform.python_version()}", *(f"{name} {version}" for name, version in found.items())]
    if device.type == "cuda":
        versions += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}", f"driver {driver()}"]
    lines = [f"## Measured on {describe_machine(device).partition(',')[0]}, {datetime.date.today()}", ""]
    lines += [f"{describe_machine(device)}.", f"Commit {runs.git_commit() or 'unknown'}; {', '.join(versions)}.", ""]
    rows = ([PARTS[name].title, f"{each.minutes:.1f}", each.problem or "done"] for name, each in outcomes.items())
    lines += markdown_table(["part", "minutes", "outcome"], rows)
    for name, each in outcomes.items():
        lines += ["", f"### {PARTS[name].title}", "", "```sh", each.command, "```", "", each.output]
    return "\n".join(lines) + "\n"


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str:
    """The version of the GPU's driver, as nvidia-smi tells it."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal (default: cuda)")
    options.add_argument("--quick", action="store_true", help="small models; the demo is as long as ever")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options.add_argument("--limit", type=float, default=25, metavar="MINUTES", help="of a part (default: 25)")
    options.add_argument("--output_dir", type=Path, default=Path("output/bench_gpu"))
    return options.parse_args(argv)


if __name__ == "__main__":
    utils.run(main, parse_args())
