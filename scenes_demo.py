"""The whole of AMC on the embedded data, without a download or a GPU: train, evaluate, compare.

    python scenes_demo.py           stage 1 is the checkpoint that ships with the repository
    python scenes_demo.py --full    stage 1 is trained as well

Stage 1 learns to match images and captions (plain ALBEF, no boxes), as ALBEF-14M did before AMC. From it, two runs of
equally many steps on the same region phrases: "control" goes on without AMC, "AMC" adds the AMC loss on the boxes. All
three are then evaluated by the three scripts. Every step is the command that it prints; a step that is complete is not
done again, so that an interrupted demo goes on where it stopped.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import utils
from config import GroundingConfig, PretrainConfig, load_config
from dataset.expressions import Expression
from dataset.scenes.paths import SCENES, SHIPPED, TEXT_ENCODER
from grounding import maps, metrics
from grounding.benchmarks import BENCHMARKS, REFCOCO, Benchmark
from grounding.pictures.panels import Case, contact_sheet, loss_curves
from grounding.report.page import Section
from grounding.report.rows import Source
from grounding.report.write import section, write_report
from grounding.results import ResultFolder, percent
from models.checkpoint import export_student
from runs import STEPS_LOG, read_log

CONFIGS = Path("configs/scenes")
SCRIPTS = {"refcoco": "", "refclef": "_refclef", "flickr": "_flickr"}
MODELS = {"stage 1": "stage1", "control": "control", "AMC": "amc"}  # the last is what the others are compared with
SHOWN_CASES = 10

Table = dict[str, dict[str, float | None]]  # model -> column -> accuracy


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    output: Path = args.output_dir
    run_step("scenes", ["prepare.py", "scenes", str(SCENES)])
    stage1 = train_stage1(output) if args.full else SHIPPED
    checkpoints = {"stage1": stage1}
    for name, config in (("amc", "Pretrain.yaml"), ("control", "Pretrain_control.yaml")):
        checkpoints[name] = train(output / name, CONFIGS / config, ["--checkpoint", str(stage1)], processes=2)
    steps = {}
    for name, checkpoint in checkpoints.items():
        for benchmark in SCRIPTS:
            steps[f"{name} on {benchmark}"] = evaluation(checkpoint, benchmark, output / name / benchmark)
    run_side_by_side(steps)
    report(output, time.monotonic() - started)


# ---- steps


def run_step(name: str, words: list[str], processes: int = 1) -> None:
    """Run one of the repository's programs, by torchrun if in several processes; its failure ends the demo."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    print(f"\n== {name}: python {' '.join([*launcher, *words])}", flush=True)
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    status = subprocess.run([sys.executable, *launcher, *words], env=environment, check=False).returncode
    if status:
        raise utils.UserError(f"'{name}' failed with exit status {status}; its message stands above")


def run_side_by_side(steps: dict[str, list[str]]) -> None:
    """Run several programs, one to a core; what each says is shown when it ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            env=environment,
            text=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, words), done in zip(steps.items(), pool.map(run, steps.values()), strict=True):
            print(f"\n== {name}: python {' '.join(words)}\n{done.stdout}", end="", flush=True)
            if done.returncode:
                pool.shutdown(cancel_futures=True)
                raise utils.UserError(f"'{name}' failed with exit status {done.returncode}; its message stands above")


def train(output: Path, config: Path, start: list[str], processes: int = 1, options: Sequence[str] = ()) -> Path:
    """Run Pretrain.py, or what is missing of an interrupted run; returns the last checkpoint.

    `start` says what to start from; `options` are given to a resumed run as well.
    """
    last = output / f"checkpoint_{load_config(config, PretrainConfig).schedular.epochs - 1:02d}.pth"
    if not last.exists():
        begun = any(output.glob("checkpoint_*.pth"))
        words = ["--config", str(config), "--output_dir", str(output), "--text_encoder", str(TEXT_ENCODER)]
        words += ["--device", "cpu", "--num_workers", "0", *options, *(["--resume"] if begun else start)]
        run_step(output.name, ["Pretrain.py", *words], processes)
    return last


def evaluation(checkpoint: Path, benchmark: str, output: Path) -> list[str]:
    """The program that evaluates a checkpoint on one of the scenes' benchmarks, and its options."""
    config = CONFIGS / f"Grounding_{benchmark}.yaml"
    words = ["--checkpoint", str(checkpoint), "--output_dir", str(output), "--config", str(config)]
    words += ["--text_encoder", str(TEXT_ENCODER), "--device", "cpu", "--num_workers", "0"]
    return [f"grounding_eval_singlegpu{SCRIPTS[benchmark]}.py", *words]


def train_stage1(output: Path) -> Path:
    """Train stage 1 from random weights and keep the student alone, in the form that ships with the repository."""
    path = output / SHIPPED.name
    checkpoint = train(output / "stage1", CONFIGS / "Pretrain_stage1.yaml", [])
    export_student(checkpoint, path)
    return path


# ---- report


def report(output: Path, seconds: float) -> None:
    """Print the table of all models, and leave it with the pictures in the output folder."""
    table: Table = {}
    cases: list[Case] = []
    sections: list[Section] = []
    for benchmark, kind in BENCHMARKS.items():
        config = load_config(CONFIGS / f"Grounding_{benchmark}.yaml", GroundingConfig)
        folders = {model: ResultFolder(output / name / benchmark / "result") for model, name in MODELS.items()}
        expressions = kind.load(config)
        for model, row in {**chance(kind, config, expressions), **accuracies(kind, config, folders)}.items():
            table.setdefault(model, {}).update(row)
        sources = [Source(model, folder, "00") for model, folder in folders.items()]
        sections.append(section(kind, expressions, sources, others=len(sources) - 1))
        if kind is REFCOCO:
            cases = choose_cases(expressions, list(folders.values()))
    utils.write_text(output / "table.md", markdown(table))
    contact_sheet(cases, list(MODELS), output / "heat_maps.png")
    runs = {model: read_log(output / name / STEPS_LOG) for model, name in MODELS.items() if model != "stage 1"}
    loss_curves(runs, output / "loss_curves.png")
    training = [output / name for name in MODELS.values()]
    write_report(output / "report.html", "AMC on the embedded scenes", sections, training)
    print(
        f"\n{markdown(table)}\nAccuracies in %. Matching is over balanced pairs, of held-out scenes as all the rest is."
    )
    print(f"Done in {seconds / 60:.1f} minutes. In {output}:")
    print("  table.md, heat_maps.png, loss_curves.png; per model its checkpoints, logs and results")
    print(f"Open the report in a browser: {(output / 'report.html').resolve().as_uri()}")


def chance(benchmark: Benchmark, config: GroundingConfig, expressions: Sequence[Expression]) -> Table:
    """The row of accuracies to expect of a random pixel, a random detection, a random answer."""
    row: dict[str, float | None] = {}
    for metric in benchmark.metrics:
        values: list[float] = []
        for expression in expressions:
            if metric == "point":
                assert expression.size is not None
                values.append(float(maps.inside(expression.boxes, *expression.size).mean()))
            else:
                assert expression.detections is not None
                values.append(metrics.box_chance(expression.detections, expression.boxes[0]))
        splits = [expression.split for expression in expressions]
        for name, value in metrics.split_accuracies(values, splits, benchmark.splits).items():
            row[f"{benchmark.name} {metric} {name}"] = value
    for file in config.matching_file:
        row[Path(file).stem.replace("_", " ")] = 0.5
    return {"chance": row}


def accuracies(benchmark: Benchmark, config: GroundingConfig, folders: dict[str, ResultFolder]) -> Table:
    """Each model's row of accuracies on one benchmark, from its log."""
    table: Table = {}
    names = [*benchmark.metrics, *(Path(file).stem for file in config.matching_file)]
    for model, folder in folders.items():
        row = table.setdefault(model, {})
        for (name, key), value in folder.accuracies("00", names).items():
            column = f"{benchmark.name} {name} {key}" if name in benchmark.metrics else key.replace("_", " ")
            row[column] = value
    return table


def markdown(table: Table) -> str:
    """The table turned on its side: a line per benchmark and split, a column per model."""
    keys = list(dict.fromkeys(key for row in table.values() for key in row))
    lines = ["| | " + " | ".join(table) + " |", "|---|" + "---:|" * len(table)]
    lines += [f"| {key} | " + " | ".join(percent(row.get(key)) for row in table.values()) + " |" for key in keys]
    return "\n".join(lines) + "\n"


def choose_cases(expressions: Sequence[Expression], folders: Sequence[ResultFolder]) -> list[Case]:
    """Expressions at equal distances through the test files, with the map of each model."""
    ids = [expression.ref_id for expression in expressions]
    records: list[list[dict[str, Any]]] = []
    for folder in folders:
        found = folder.read("00", ids)
        assert found is not None
        records.append(found[0])
    chosen = range(0, len(expressions), max(1, len(expressions) // SHOWN_CASES))[:SHOWN_CASES]
    return [Case(expressions[i], [rows[i]["pred"] for rows in records]) for i in chosen]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, evaluate and compare on the embedded scenes.")
    parser.add_argument("--full", action="store_true", help="train stage 1 too, instead of taking the one that ships")
    parser.add_argument("--output_dir", type=Path, default=Path("output/scenes"))
    utils.run(main, parser.parse_args())
