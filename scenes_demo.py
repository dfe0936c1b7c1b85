"""The story of AMC on synthetic scenes, without a download or a GPU: train with and without AMC, and compare.

    python scenes_demo.py           a few minutes: 150 steps a model, RefCOCO+ alone
    python scenes_demo.py --all     1,275 steps a model, three benchmarks: the table of docs/scenes.md
    python scenes_demo.py --full    the same, and stage 1 is trained as well

Stage 1 is plain ALBEF, trained on captions without boxes. Two models go on from it for equally many steps on the same
region phrases: the control without AMC, the other with the AMC loss on their boxes. All three are evaluated on held-out
scenes. An interrupted demo goes on where it stopped.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import utils
from config import GroundingConfig, PretrainConfig, load_config
from dataset.expressions import Expression
from dataset.scenes.paths import CONFIGS, SCENES, SHIPPED, SHIPPED_AMC, SHOWN
from grounding import maps, metrics
from grounding.benchmarks import BENCHMARKS, REFCOCO_PLUS, Benchmark
from grounding.pictures.panels import Case, contact_sheet, loss_curves
from grounding.report.write import section, write_report
from grounding.results import ResultFolder, Source, percent
from runs import STEPS_LOG, Position, checkpoint_path, newest_checkpoint, read_log
from terminal import aligned

COMMON = ["--text_encoder", str(SCENES / "text_encoder"), "--device", "cpu", "--num_workers", "0"]
MODELS = {"stage 1": "stage1", "control": "control", "AMC": "amc"}  # the last is what the others are compared with
TITLES = {
    "first_look": 'A first look: where the AMC model that ships sees "the small red triangle"',
    "scenes": "Draw 12,750 synthetic scenes, in the formats of the real data sets",
    "stage1": "Train stage 1: plain ALBEF on captions, without boxes",
    "student": "Write the student of stage 1 alone, in half precision",
    "control": "Train the control: stage 1 goes on with phrases of regions, without AMC",
    "amc": "Train AMC: the same phrases, with the AMC loss on their boxes",
}
LOOK = [str(SHOWN / "100000.jpg"), "the small red triangle", "--box", "19", "77", "20", "18"]
LOOK += ["--checkpoint", str(SHIPPED_AMC), "--device", "cpu"]
# A constant rate after the warm-up: timm warns of a cosine over one epoch.
SHORT_TRAINING = ["--set", "schedular.epochs=1", "--set", "schedular.sched=step", "--max_steps", "150"]
SHORT_EVALUATION = ["matching_file=[]"]
CHANCE: dict[str, Callable[[Any], float]] = {  # metric -> accuracy of a random pixel, of a random detection
    "point": lambda expression: float(maps.inside(expression.boxes, *expression.size).mean()),
    "box": lambda expression: metrics.box_chance(expression.detections, expression.boxes[0]),
}
CLOSING = """
Accuracies in %. Point: the map's maximum lies in the true box. Box: the detection that the map ranks first
is right. testB asks for pairs of colour and shape that training never shows.

Done in {minutes:.1f} minutes. In {output}: report.html, table.md, heat_maps.png,
loss_curves.png; per model its checkpoints, logs and results; in logs/ each command and its output.
Open the report in a browser: {page}
Ask the models yourself: make web. Train them to the end: python scenes_demo.py --all"""

Table = dict[str, dict[str, float | None]]  # model -> column -> accuracy


def main(args: argparse.Namespace) -> None:
    started, short = time.monotonic(), not (args.all or args.full)
    output: Path = args.output_dir or Path("output/scenes" + ("_full" if args.full else "_all" if args.all else ""))
    benchmarks = {name: found for name, found in scenes_benchmarks().items() if found is REFCOCO_PLUS or not short}
    torch.set_num_threads(1)  # for the report: its maps are small, and a busy machine makes threads wait for each other
    training, overrides = (SHORT_TRAINING, SHORT_EVALUATION) if short else ([], [])
    device = ["--device", args.device]  # after that of `COMMON`: the last one counts
    look = ["demo.py", *LOOK, *device, "--output_dir", str(output / "first_look")]
    run_step("first_look", look, output / "logs")
    print(*(f"   {path}" for path in (output / "first_look").glob("*.png")), flush=True)
    run_step("scenes", ["prepare.py", "scenes", str(SCENES)], output / "logs")
    stage1 = SHIPPED
    if args.full:
        stage1 = output / "stage1" / "student"
        trained = train(output / "stage1", CONFIGS / "Pretrain_stage1.yaml", [], options=device)
        run_step("student", ["export.py", str(trained), str(stage1), "--half", "--force"], output / "logs")
    checkpoints = {"stage1": stage1}
    for name, config in (("control", "Pretrain_control.yaml"), ("amc", "Pretrain.yaml")):
        processes, options = shared_out(CONFIGS / config, args.device)
        start = ["--checkpoint", str(stage1)]
        checkpoints[name] = train(output / name, CONFIGS / config, start, processes, [*training, *options])
    shown = ", ".join(benchmark.name for benchmark in benchmarks.values())
    print(f"\n== Evaluate the three models on held-out scenes: {shown}", flush=True)
    steps = {
        f"{name}_{benchmark}": [*evaluation(checkpoint, benchmark, output / name / benchmark, overrides), *device]
        for name, checkpoint in checkpoints.items()
        for benchmark in benchmarks
    }
    run_side_by_side(steps, output / "logs")
    print("\n== Compare: tables, heat maps, curves, a page\n", flush=True)
    print(report(output, benchmarks, overrides))
    minutes, page = (time.monotonic() - started) / 60, (output / "report.html").resolve().as_uri()
    print(CLOSING.format(minutes=minutes, output=output, page=page))


def scenes_benchmarks() -> dict[str, Benchmark]:
    """The benchmarks that the scenes have a config for, by the name in the config's file name."""
    found = [one for one in BENCHMARKS.values() if (CONFIGS / Path(one.config).name).is_file()]
    return {Path(one.config).stem.removeprefix("Grounding_"): one for one in found}


# ---- steps


def run_step(name: str, words: list[str], logs: Path, processes: int = 1, alone: bool = True) -> None:
    """Run one of the repository's programs, by torchrun if in several processes; its failure ends the demo.

    Args:
        logs: NAME.txt there takes the command and its output. Progress and errors are shown all the same.
        alone: False for one of several at a time: it gets one thread, and is shown only if it fails.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    threads = max(1, (os.cpu_count() or 1) // processes) if alone else 1
    started, command, log = time.monotonic(), [*launcher, *words], logs / f"{name}.txt"
    settings: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": str(threads)}, "check": False}
    if alone:
        print(f"\n== {TITLES.get(name, name)}", flush=True)
    logs.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        print(f"python {' '.join(command)}", file=out, flush=True)
        errors = None if alone else subprocess.STDOUT
        status = subprocess.run([sys.executable, *command], stdout=out, stderr=errors, **settings).returncode
    if status:
        print("" if alone else log.read_text(encoding="utf-8"))
        raise utils.UserError(f"'{name}' failed with exit status {status}; its message stands above")
    if alone:
        print(f"   {time.monotonic() - started:.0f} s", flush=True)


def run_side_by_side(steps: dict[str, list[str]], logs: Path) -> None:
    """Run several programs, one to a core, and name those that are done."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda name: run_step(name, steps[name], logs, alone=False), steps)
        for name, _ in zip(steps, done, strict=True):
            print(f"   {name}", flush=True)


def train(output: Path, config: Path, start: list[str], processes: int = 1, options: Sequence[str] = ()) -> Path:
    """Run Pretrain.py, with `start` or, for what an interrupted run lacks, --resume; returns the last checkpoint."""
    overrides = [value for option, value in itertools.pairwise(options) if option == "--set"]
    last = checkpoint_path(output, Position(load_config(config, PretrainConfig, overrides).schedular.epochs))
    if not last.exists():
        begun = newest_checkpoint(output)
        words = ["Pretrain.py", "--config", str(config), "--output_dir", str(output), *COMMON, *options]
        run_step(output.name, [*words, *(["--resume"] if begun else start)], output.parent / "logs", processes)
    return last


def shared_out(config: Path, device: str) -> tuple[int, list[str]]:
    """Processes of a training of two, and its options: where there is one GPU, one process has the batches of both."""
    if device == "cpu" or torch.cuda.device_count() > 1:
        return 2, ["--device", device]
    return 1, ["--device", device, "--set", f"batch_size={2 * load_config(config, PretrainConfig).batch_size}"]


def evaluation(checkpoint: Path, benchmark: str, output: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The program that evaluates a checkpoint on one of the scenes' benchmarks, and its options."""
    words = ["grounding_eval.py", "--config", str(CONFIGS / f"Grounding_{benchmark}.yaml")]
    words += ["--checkpoint", str(checkpoint), "--output_dir", str(output)]
    return words + [word for override in overrides for word in ("--set", override)] + COMMON


# ---- report


def report(output: Path, benchmarks: dict[str, Benchmark], overrides: Sequence[str]) -> str:
    """Write the table of all models, pictures and the page into the output folder; returns the table for a terminal."""
    table: Table = {}
    sections = []
    for name, benchmark in benchmarks.items():
        config = load_config(CONFIGS / f"Grounding_{name}.yaml", GroundingConfig, list(overrides))
        folders = {model: ResultFolder(output / folder / name / "result") for model, folder in MODELS.items()}
        expressions = benchmark.load(config)
        for model, row in {**chance(benchmark, config, expressions), **accuracies(benchmark, config, folders)}.items():
            table.setdefault(model, {}).update(row)
        sources = [Source(model, folder, "00") for model, folder in folders.items()]
        sections.append(section(benchmark, expressions, sources, others=len(sources) - 1))
        if benchmark is REFCOCO_PLUS:
            contact_sheet(choose_cases(expressions, folders), list(MODELS), output / "heat_maps.png")
    header, *lines = table_rows(table)
    marked = [header, ["---", *["---:"] * len(table)], *lines]
    utils.write_text(output / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in marked))
    runs = {model: read_log(output / name / STEPS_LOG) for model, name in MODELS.items() if model != "stage 1"}
    loss_curves(runs, output / "loss_curves.png")
    trained = [output / name for name in MODELS.values()]
    write_report(output / "report.html", "AMC on the embedded scenes", sections, trained)
    return aligned([header, *lines])


def chance(benchmark: Benchmark, config: GroundingConfig, expressions: Sequence[Expression]) -> Table:
    """The row of accuracies to expect of random answers, for the metrics of `CHANCE` and for matching."""
    splits = [expression.split for expression in expressions]
    row: dict[str, float | None] = {Path(file).stem.replace("_", " "): 0.5 for file in config.matching_file}
    for metric in [metric for metric in benchmark.metrics if metric in CHANCE]:
        found = metrics.split_accuracies([CHANCE[metric](one) for one in expressions], splits, benchmark.splits)
        row |= {f"{benchmark.name} {metric} {name}": value for name, value in found.items()}
    return {"chance": row}


def accuracies(benchmark: Benchmark, config: GroundingConfig, folders: dict[str, ResultFolder]) -> Table:
    """Each model's row of accuracies on one benchmark, from its log."""
    names, table = [*benchmark.metrics, *(Path(file).stem for file in config.matching_file)], Table()
    for model, folder in folders.items():
        for (name, key), value in folder.accuracies("00", names).items():
            column = f"{benchmark.name} {name} {key}" if name in benchmark.metrics else key.replace("_", " ")
            table.setdefault(model, {})[column] = value
    return table


def table_rows(table: Table) -> list[list[str]]:
    """The table turned on its side, as cells: a row per benchmark and split, a column per model."""
    keys = list(dict.fromkeys(key for row in table.values() for key in row))
    return [["", *table], *([key, *(percent(row.get(key)) for row in table.values())] for key in keys)]


def choose_cases(expressions: Sequence[Expression], folders: dict[str, ResultFolder]) -> list[Case]:
    """Expressions at equal distances through the test files, with the map of each model."""
    found = [folder.read("00", expressions) for folder in folders.values()]
    chosen = range(0, len(expressions), max(1, len(expressions) // 10))[:10]
    return [Case(expressions[i], [cam for maps in found if maps and (cam := maps[i]) is not None]) for i in chosen]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train with and without AMC on the embedded scenes, and compare.")
    parser.add_argument("--all", action="store_true", help="all steps and benchmarks: the table of docs/scenes.md")
    parser.add_argument("--full", action="store_true", help="the same, and train stage 1 too")
    parser.add_argument(
        "--device", default="cpu", help="cpu, or cuda for the GPUs (default: cpu, which is quick enough)"
    )
    parser.add_argument("--output_dir", type=Path, help="default: output/scenes, output/scenes_all, output/scenes_full")
    try:
        utils.run(main, parser.parse_args())
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on where this one stopped")
