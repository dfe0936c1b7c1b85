"""What each part of AMC's loss does, and SelfEQ's, on the embedded scenes: variants of stage 2, several seeds each.

    python benchmarks/ablation.py                                       all variants, seeds 42, 43 and 44
    python benchmarks/ablation.py --variants "both terms" control --seeds 45 46
    python benchmarks/ablation.py --variants control SelfEQ "both terms" "AMC and SelfEQ" --short

Every run is stage 2 of `scenes_demo.py --all`, or with `--short` of `make demo`, with another seed or other weights and
margins: two processes, from the stage 1 that ships, as many steps on the same phrases; then RefCOCO+. The seed draws
batches, augmentation, masked words and hard negatives; stage 1 is the same for all. What is complete is not done again,
so that an interrupted ablation goes on where it stopped. OUTPUT/table.md has means and standard deviations.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from benchmarks.machine import describe_machine, markdown_table, parser
from config import GroundingConfig, load_config
from dataset.scenes.paths import CONFIGS, SCENES, SHIPPED
from grounding.benchmarks import REFCOCO_PLUS
from grounding.results import ResultFolder
from scenes_demo import SHORT_EVALUATION, SHORT_TRAINING, accuracies, evaluation, run_step, train

AMC, CONTROL = CONFIGS / "Pretrain.yaml", CONFIGS / "Pretrain_control.yaml"
# The same entries, and synonyms of their words.
SELFEQ = ["train_file=[data/scenes/train_relations.json]", "amc.layer=3"]
SELFEQ += ["selfeq.weight_similarity=1", "selfeq.weight_consistency=0.5"]
VARIANTS: dict[str, tuple[Path, list[str]]] = {  # a config, and what is changed of it
    "both terms": (AMC, []),
    "mean term only": (AMC, ["amc.weight_max=0"]),
    "max term only": (AMC, ["amc.weight_mean=0"]),
    "neither term": (AMC, ["amc.weight_mean=0", "amc.weight_max=0"]),
    "both terms, published margins": (AMC, ["amc.margin_mean=0.1", "amc.margin_max=0.5"]),
    "control": (CONTROL, []),
    "SelfEQ": (CONTROL, SELFEQ),
    "SelfEQ, a tenth": (CONTROL, [*SELFEQ, "selfeq.weight_similarity=0.1", "selfeq.weight_consistency=0.05"]),
    "SelfEQ, std_over region": (CONTROL, [*SELFEQ, "selfeq.std_over=region"]),
    "AMC and SelfEQ": (AMC, SELFEQ),
    "both terms, on masks": (AMC, ["train_file=[data/scenes/masks/train_phrases.json]"]),
}
COLUMNS = ["RefCOCO+ point val_d", "RefCOCO+ point testA_d", "RefCOCO+ point testB_d", "RefCOCO+ box val_d"]
COLUMNS += ["matching val"]
Accuracies = dict[str, list[dict[str, float | None]]]  # variant -> the accuracies of each seed's run


def main(args: argparse.Namespace) -> None:
    started, rows = time.monotonic(), Accuracies()
    run_step("scenes", ["prepare.py", "scenes", str(SCENES)], args.output_dir / "logs")
    for seed in args.seeds:
        for variant in args.variants:
            folder: Path = args.output_dir / variant.replace(",", "").replace(" ", "_") / f"seed_{seed}"
            rows.setdefault(variant, []).append(train_and_evaluate(variant, seed, folder, args.short))
            utils.write_text(args.output_dir / "table.md", results_table(rows))
    print(f"\n{results_table(rows)}\nAccuracies in %, mean ± standard deviation over the runs. {describe_machine()}")
    print(f"Done in {(time.monotonic() - started) / 60:.0f} minutes; runs and table.md are in {args.output_dir}")


def train_and_evaluate(variant: str, seed: int, folder: Path, short: bool) -> dict[str, float | None]:
    """Train and evaluate one run; returns its accuracies by column."""
    config, changes = VARIANTS[variant]
    training, overrides = (SHORT_TRAINING, SHORT_EVALUATION) if short else ([], [])
    options = ["--seed", str(seed), *training]
    for change in changes:
        options += ["--set", change]
    checkpoint = train(folder, config, ["--checkpoint", str(SHIPPED)], 2, options)
    words = evaluation(checkpoint, "refcoco", folder / "refcoco", overrides)
    run_step(f"{folder.name}_evaluated", words, folder.parent / "logs")
    grounding = load_config(CONFIGS / "Grounding_refcoco.yaml", GroundingConfig, overrides)
    result = ResultFolder(folder / "refcoco" / "result")
    return accuracies(REFCOCO_PLUS, grounding, {variant: result})[variant]


def results_table(rows: Accuracies) -> str:
    """A line a variant; the spread where there are several runs."""
    cells = (
        [
            variant,
            str(len(runs)),
            *(spread([100 * value for run in runs if (value := run.get(key)) is not None]) for key in COLUMNS),
        ]
        for variant, runs in rows.items()
    )
    return "\n".join(markdown_table(["", "runs", *COLUMNS], cells)) + "\n"


def spread(values: list[float]) -> str:
    """Mean and standard deviation (of the sample, n - 1), as text."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    options.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    options.add_argument("--short", action="store_true", help="150 steps a run, as in make demo, and no matching")
    options.add_argument("--output_dir", type=Path, default=Path("output/ablation"))
    utils.run(main, options.parse_args())
