"""Makes the JSON files that training and evaluation read.

    python prepare.py scenes data/scenes
    python prepare.py check configs/Pretrain.yaml configs/Grounding_*.yaml

`scenes` draws the embedded data set: synthetic scenes in the real formats, for trying everything without a download.
`check` reads every file, entry and image that configs name, and lists what cannot be used.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from dataset import scenes_files


def prepare_scenes(args: argparse.Namespace) -> None:
    """Write the embedded data set, unless it is there already."""
    args.annotated = min(args.annotated, args.train)
    wanted = scenes_files.parameters(args.seed, args.train, args.annotated, args.eval, args.size)
    manifest = scenes_files.read_manifest(args.out)
    if manifest and manifest.get("parameters") == wanted and not args.force:
        print(f"{args.out} already holds this data set, complete; --force writes it anew")
        return
    if manifest and not args.force:
        sys.exit(
            f"error: {args.out} holds a data set of other parameters ({manifest.get('parameters')}); "
            "choose another folder, or pass --force to replace it"
        )
    total = args.train + 3 * args.eval
    with tqdm(total=total, desc="scenes", unit="image", disable=None) as bar:
        scenes_files.generate(args.out, args.seed, args.train, args.annotated, args.eval, args.size, bar.update)
    counts = (scenes_files.read_manifest(args.out) or {})["counts"]
    listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
    print(f"wrote {total} images and their annotations ({listed}) to {args.out}")


def check_configs(args: argparse.Namespace) -> None:
    """Check what configs name; exit status 1 if there are errors."""
    from dataset.raw.check import check  # imports torch: seconds that the other commands' help should not cost

    report = check(args.configs, args.set, args.sample, args.workers, args.show)
    print(report.json() if args.json else report.text())
    if report.total("error"):
        sys.exit(1)


def integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    """An argparse type: an integer from low to high."""

    def parse(word: str) -> int:
        value = int(word)
        if not low <= value <= high:
            upper = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{upper}, not {value}")
        return value

    parse.__name__ = "integer"  # for argparse's message about what is no integer
    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("scenes", help="draw the embedded data set of synthetic scenes")
    command.add_argument("out", type=Path, help="folder to write to")
    count = integer(1, scenes_files.IDS_PER_SPLIT)
    command.add_argument("--seed", type=integer(0), default=0, help="equal seeds give equal files (default: 0)")
    command.add_argument("--train", type=count, default=12000, metavar="N", help="training scenes (default: 12000)")
    command.add_argument(
        "--annotated", type=count, default=4000, metavar="N", help="of them, scenes with boxes (default: 4000)"
    )
    command.add_argument(
        "--eval", type=count, default=250, metavar="N", help="scenes each of val, testA and testB (default: 250)"
    )
    side = integer(scenes_files.SMALLEST_SIZE)
    command.add_argument("--size", type=side, default=96, help="mean side of an image in pixels (default: 96)")
    command.add_argument("--force", action="store_true", help="write anew what is there already")
    command.set_defaults(run=prepare_scenes)

    command = commands.add_parser(
        "check",
        help="check everything that configs name",
        description="Check configs of training and evaluation, and every file, entry and image that they name. "
        "Exit status: 0 if there are no errors, else 1; warnings and notes do not count.",
    )
    command.add_argument("configs", nargs="+", metavar="CONFIG", help="a config of training or evaluation")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of each of the configs"
    )
    command.add_argument(
        "--sample", type=integer(0), metavar="N", help="decode N images in place of all; of the others read the headers"
    )
    cores = os.cpu_count() or 1
    command.add_argument(
        "--workers", type=integer(1), default=cores, metavar="N", help="processes that read images (default: all cores)"
    )
    command.add_argument(
        "--show",
        type=integer(1),
        default=5,
        metavar="N",
        help="list so many cases of each kind of problem (default: 5)",
    )
    command.add_argument("--json", action="store_true", help="print JSON in place of the table, and nothing else")
    command.set_defaults(run=check_configs)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
