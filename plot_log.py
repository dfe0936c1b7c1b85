"""Draw the losses of one or several training runs.

    python plot_log.py RUN [RUN ...] [--output losses.png]

A RUN is the --output_dir of Pretrain.py, or its log.txt or steps.jsonl. steps.jsonl is drawn where there is one.
"""

import argparse
from pathlib import Path

import utils
from grounding.pictures.panels import loss_curves
from runs import read_runs


def main(args: argparse.Namespace) -> None:
    if args.output.suffix not in (".png", ".svg"):
        raise utils.UserError(f"--output {args.output}: the name must end in .png or .svg")
    runs, unit = read_runs(args.run, args.epochs)
    loss_curves(runs, args.output, unit)
    print(f"{args.output}: {', '.join(f'{name} ({len(rows)} points)' for name, rows in runs.items())}, by {unit}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the losses of training runs.")
    parser.add_argument("run", type=Path, nargs="+", help="a run's folder, its log.txt or its steps.jsonl")
    parser.add_argument("--output", type=Path, default=Path("losses.png"), help="a PNG or an SVG (losses.png)")
    parser.add_argument("--epochs", action="store_true", help="draw log.txt, a point an epoch")
    utils.run(main, parser.parse_args())
