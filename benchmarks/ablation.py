"""What each part of AMC's loss does, on the embedded scenes: variants of stage 2, several seeds each.

    python benchmarks/ablation.py                                       all variants, seeds 42, 43 and 44
    python benchmarks/ablation.py --variants "both terms" control --seeds 45 46

Every run is `make demo`'s stage 2 with another seed or other weights and margins: two processes, from the stage 1 that
ships, as many steps on the same phrases; then RefCOCO+. The seed draws batches, augmentation, masked words and hard
negatives; stage 1 is the same for all. What is complete is not done again, so that an interrupted ablation goes on
where it stopped. OUTPUT/table.md has mean and standard deviation over the seeds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from benchmarks.machine import describe_machine
from config import GroundingConfig, load_config
from dataset.scenes.paths import SCENES, SHIPPED
from grounding.benchmarks import REFCOCO
from grounding.results import ResultFolder
from scenes_demo import CONFIGS, accuracies, evaluation, run_step, train

AMC, CONTROL = CONFIGS / "Pretrain.yaml", CONFIGS / "Pretrain_control.yaml"
VARIANTS: dict[str, tuple[Path, list[str]]] = {  # a config, and what is changed of it
    "both terms": (AMC, []),
    "mean term only": (AMC, ["amc.weight_max=0"]),
    "max term only": (AMC, ["amc.weight_mean=0"]),
    "neither term": (AMC, ["amc.weight_mean=0", "amc.weight_max=0"]),
    "both terms, published margins": (AMC, ["amc.margin_mean=0.1", "amc.margin_max=0.5"]),
    "control": (CONTROL, []),
}
COLUMNS = ["RefCOCO+ point val_d", "RefCOCO+ point testA_d", "RefCOCO+ point testB_d", "RefCOCO+ box val_d"]
COLUMNS += ["matching val"]
Rows = dict[str, list[dict[str, float | None]]]  # variant -> the accuracies of each seed's run


def main(args: argparse.Namespace) -> None:
    started, rows = time.monotonic(), Rows()
    run_step("scenes", ["prepare.py", "scenes", str(SCENES)])
    for seed in args.seeds:
        for variant in args.variants:
            folder: Path = args.output_dir / variant.replace(",", "").replace(" ", "_") / f"seed_{seed}"
            rows.setdefault(variant, []).append(measure(variant, seed, folder))
            utils.write_text(args.output_dir / "table.md", markdown(rows))
    print(f"\n{markdown(rows)}\nAccuracies in %, mean ± standard deviation over the runs. {describe_machine()}")
    print(f"Done in {(time.monotonic() - started) / 60:.0f} minutes; runs and table.md are in {args.output_dir}")


def measure(variant: str, seed: int, folder: Path) -> dict[str, float | None]:
    """Train and evaluate one run; returns its accuracies by column."""
    config, changes = VARIANTS[variant]
    options = ["--seed", str(seed)]
    for change in changes:
        options += ["--set", change]
    checkpoint = train(folder, config, ["--checkpoint", str(SHIPPED)], 2, options)
    run_step(f"{variant}, seed {seed}, evaluated", evaluation(checkpoint, "refcoco", folder / "refcoco"))
    grounding = load_config(CONFIGS / "Grounding_refcoco.yaml", GroundingConfig)
    result = ResultFolder(folder / "refcoco" / "result")
    return accuracies(REFCOCO, grounding, {variant: result})[variant]


def markdown(rows: Rows) -> str:
    """A line a variant; the spread where there are several runs."""
    lines = ["| | runs | " + " | ".join(COLUMNS) + " |", "|---|---:|" + "---:|" * len(COLUMNS)]
    for variant, runs in rows.items():
        cells = [spread([100 * value for run in runs if (value := run[column]) is not None]) for column in COLUMNS]
        lines.append(f"| {variant} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean and standard deviation (of the sample, n - 1), as text."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--output_dir", type=Path, default=Path("output/ablation"))
    utils.run(main, parser.parse_args())
