"""Makes the files that training and evaluation read, and checks them.

    command     reads                            makes
    scenes      nothing                          synthetic scenes in all formats, to try everything without a download
    vg          Visual Genome                    the three training files
    flickr      Flickr30k Entities               the files of Flickr30k evaluation
    refer       REFER's refs and instances.json  the expressions of RefCOCO, RefCOCO+, RefCOCOg or RefCLEF
    refer-train the same                         their train split as a training file, with boxes or masks
    detections  MAttNet's detections             dets.json, the detections by image
    check       configs and all that they name   a list of what cannot be used

    python prepare.py scenes data/scenes
    python prepare.py vg downloads/vg --out data
    python prepare.py flickr downloads/flickr30k_entities --out data/flickr30k
    python prepare.py refer data/refer --dataset refcoco+ --out data/refcoco+
    python prepare.py refer-train data/refer --dataset refcoco+ --masks --out data/refcoco+/masks.json
    python prepare.py detections mattnet_dets.json --out data/refcoco+/dets.json
    python prepare.py check configs/Pretrain.yaml configs/Grounding_*.yaml

docs/data.md says where to get the raw files. `python prepare.py COMMAND --help` lists a command's options.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

import utils
from dataset.raw import flickr_entities, visual_genome
from dataset.raw import refer as raw_refer
from dataset.raw.check import check
from dataset.raw.evaluation_images import read_evaluation_images
from dataset.raw.vg_phrases import GROUPINGS, POSITIONS, Rules
from dataset.raw.visual_genome import OUTPUTS
from dataset.refer import SPLITS
from dataset.scenes import files as scenes_files
from grounding.benchmarks import benchmark_of
from terminal import integer

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def prepare_scenes(args: argparse.Namespace) -> None:
    """Draw synthetic scenes and write them in all formats, unless they are there already."""
    args.annotated = min(args.annotated, args.train)
    sizes = args.train, args.annotated, args.eval, args.size
    wanted = scenes_files.parameters(args.seed, *sizes)
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
        counts = scenes_files.generate(args.out, args.seed, *sizes, bar.update)
    listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
    print(f"wrote {total} images and their annotations ({listed}) to {args.out}")


def prepare_vg(args: argparse.Namespace) -> None:
    """Write vg_descriptions.json, vg_attributes.json and vg_attributes_spatial.json, the training files.

    The defaults keep all that training can use. A table at the end tells how many entries each rule dropped;
    docs/data.md explains the rules.
    """
    if args.min_area > args.max_area or args.min_words > (args.max_words or math.inf):
        sys.exit("error: --min-area must not exceed --max-area, nor --min-words --max-words")
    rules = Rules(**{name: getattr(args, name) for name in Rules._fields})
    images, drafts = visual_genome.prepare(
        args.raw, args.out, rules, args.only, args.exclude_eval, args.image_root, args.hold_out
    )
    print(visual_genome.summary(images, drafts))
    print("\nwrote " + ", ".join(str(args.out / OUTPUTS[name]) for name in drafts))


def prepare_flickr(args: argparse.Namespace) -> None:
    """Write <split>.txt, bounding_boxes_<split>.json and sentences_<split>.json, as info-ground does."""
    folder = args.source if args.source.is_dir() else args.source.parent
    ids_files = args.ids or [folder / name for name in flickr_entities.SPLIT_FILES]
    splits = flickr_entities.convert(args.source, ids_files)
    flickr_entities.write(args.out, splits)
    for name, split in splits.items():
        print(f"{name}: {split.summary()}")
    print(f"wrote <split>.txt, bounding_boxes_<split>.json and sentences_<split>.json to {args.out}")


def refer_lists(args: argparse.Namespace, keep_repeated: bool = True) -> tuple[str, raw_refer.Lists]:
    """Whose split is used, and the lists of expressions that a command's options ask for."""
    split_by = args.split_by or raw_refer.default_split(args.folder, args.dataset)
    if args.skip_missing and not args.image_root:
        sys.exit("error: --skip-missing needs --image-root, since no images are looked for without it")
    options = args.image_root, keep_repeated, args.skip_missing
    return split_by, raw_refer.make_lists(args.folder, args.dataset, split_by, *options)


def prepare_refer_train(args: argparse.Namespace) -> None:
    """Write the train split of a REFER data set as a training file for Pretrain.py: an entry for each ref.

    Images that are also in the data set's val and test splits are left out, and those in the splits of --exclude-eval.
    """
    excluded = [read_evaluation_images(path) for path in args.exclude_eval]
    split_by, lists = refer_lists(args)
    entries, counts = raw_refer.training_entries(lists, args.dataset, excluded, args.masks)
    utils.write_text(args.out, json.dumps(entries) + "\n")
    print("\n".join(f"{name}: {count:,}" for name, count in counts.items()))
    regions = "masks" if args.masks else "boxes"
    print(f"wrote the train split of {args.dataset}, split by {split_by}, with {regions} to {args.out}")


def prepare_refer(args: argparse.Namespace) -> None:
    """Write <dataset>_{train,val,test}.json. The test file also holds testA, testB and testC."""
    split_by, lists = refer_lists(args, args.keep_repeated)
    raw_refer.write_lists(args.out, args.dataset, lists)
    print(lists.table())
    usual = raw_refer.USUAL_SPLITS[args.dataset]
    if split_by != usual and not args.split_by:
        print(f"note: refs({usual}).p is not there, of which the published numbers are; this is refs({split_by}).p")
    files = ", ".join(f"{args.dataset}_{part}.json: {len(rows)}" for part, rows in lists.parts.items())
    print(f"wrote the expressions of {args.dataset}, split by {split_by}, to {args.out} ({files})")


def prepare_detections(args: argparse.Namespace) -> None:
    """Group MAttNet's list of {image_id, box, ...} by image, and keep the order within an image."""
    grouped = raw_refer.group_detections(args.file, args.instances)
    utils.write_text(args.out, json.dumps(grouped) + "\n")
    count, empty = sum(map(len, grouped.values())), sum(not boxes for boxes in grouped.values())
    print(f"wrote {count} detections in {len(grouped)} images, {empty} of them without any, to {args.out}")


def check_configs(args: argparse.Namespace) -> None:
    """Check configs of training and evaluation, and every file, entry and image that they name.

    The exit status is 1 if there are errors, else 0; warnings and notes do not count.
    """
    report = check(args.configs, args.set, args.sample, args.workers, args.show, benchmark_of)
    print(report.json() if args.json else report.text())
    if report.total("error"):
        sys.exit(1)


def fraction(word: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(word)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {value}")
    return value


def spatial_form(word: str) -> str:
    """An argparse type: a text that holds {position} and {phrase}."""
    if "{position}" not in word or "{phrase}" not in word:
        raise argparse.ArgumentTypeError(f"must hold {{position}} and {{phrase}}, not {word!r}")
    return word


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """A command that `run` runs, whose docstring describes it."""
    command = commands.add_parser(name, description=run.__doc__)
    command.set_defaults(run=run)
    return command


def add_vg(commands: Commands) -> None:
    command = add_command(commands, "vg", prepare_vg)
    command.set_defaults(**Rules()._asdict())
    add, count = command.add_argument, integer(1)
    files = "image_data, region_descriptions and attributes, as .json or .zip; or folders that hold them"
    add("raw", type=Path, nargs="+", help=files)
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--only", nargs="+", choices=OUTPUTS, default=list(OUTPUTS), help="files to make (default: all three)")
    splits = (
        "leave out the images of the val and test splits in these files: refs(SPLIT).p, JSON lists of expressions, "
        "Flickr30k's image ids (.txt)"
    )
    add("--exclude-eval", type=Path, nargs="+", default=[], metavar="FILE", help=splits)
    held = (
        "leave out the images of these lists of Visual Genome's image ids, one a line, as configs/Grounding_vg.yaml has"
    )
    add("--hold-out", type=Path, nargs="+", default=[], metavar="FILE", help=held)
    add("--image-root", type=Path, metavar="DIR", help="leave out images that are not in DIR (default: do not look)")
    equal = (
        "join phrases of an image into one entry if they are equal once cleaned as in training, if they are equal but "
        "for white space, or never (default: %(default)s)"
    )
    add("--group", choices=GROUPINGS, help=equal)
    for name in ("--min-area", "--max-area"):
        add(name, type=fraction, help="of a box, as a fraction of its image (default: %(default)s)")
    add("--max-boxes", type=count, metavar="N", help="leave out entries with more boxes (default: no limit)")
    add("--min-words", type=count, metavar="N", help="of a caption (default: %(default)s)")
    add("--max-words", type=count, metavar="N", help="of a caption (default: no limit)")
    add("--positions", nargs="+", choices=POSITIONS, help="positions to name in captions (default: all five)")
    apart = (
        "least distance of an object with a position from the others of its name, centre to centre, as a fraction of "
        "the image's width or height (default: %(default)s)"
    )
    add("--margin", type=fraction, help=apart)
    form = "caption made of a position and a phrase (default: '%(default)s')"
    add("--spatial-form", type=spatial_form, help=form)


def add_scenes(commands: Commands) -> None:
    add = add_command(commands, "scenes", prepare_scenes).add_argument
    count, side = integer(1, scenes_files.IDS_PER_SPLIT), integer(scenes_files.SMALLEST_SIZE)
    add("out", type=Path, help="folder to write to")
    add("--seed", type=integer(0), default=0, help="equal seeds give equal files (default: 0)")
    add("--train", type=count, default=12000, metavar="N", help="training scenes (default: 12000)")
    add("--annotated", type=count, default=4000, metavar="N", help="training scenes that have boxes (default: 4000)")
    add("--eval", type=count, default=250, metavar="N", help="scenes in each of val, testA and testB (default: 250)")
    add("--size", type=side, default=96, help="mean side of an image in pixels (default: 96)")
    add("--force", action="store_true", help="replace what is there already")


def add_flickr(commands: Commands) -> None:
    add = add_command(commands, "flickr", prepare_flickr).add_argument
    add("source", type=Path, help="folder that holds Annotations/ and Sentences/, or annotations.zip; or that archive")
    add("--out", type=Path, required=True, help="folder to write to")
    ids = (
        "one file of image ids per split, named after the split (default: train.txt, val.txt and test.txt beside the "
        "annotations)"
    )
    add("--ids", type=Path, nargs="+", metavar="FILE", help=ids)


def add_refer(commands: Commands) -> None:
    command = add_command(commands, "refer", prepare_refer)
    add_refer_options(command, "folder to write to")
    repeated = "write equal sentences of a ref as often as they occur, as in the published counts; or once"
    command.add_argument("--keep-repeated", action=argparse.BooleanOptionalAction, default=True, help=repeated)


def add_refer_train(commands: Commands) -> None:
    command = add_command(commands, "refer-train", prepare_refer_train)
    add_refer_options(command, "the training file to write")
    masks = "entries have the segmentations of instances.json (default: the boxes)"
    command.add_argument("--masks", action="store_true", help=masks)
    splits = "leave out the images of the val and test splits in these files: refs(SPLIT).p of other data sets"
    command.add_argument("--exclude-eval", type=Path, nargs="+", default=[], metavar="FILE", help=splits)


def add_refer_options(command: argparse.ArgumentParser, out: str) -> None:
    add = command.add_argument
    owners = sorted({name for names in SPLITS.values() for name in names})
    add("folder", type=Path, help="folder that holds the data sets' folders: refcoco_data in the configs")
    add("--dataset", choices=SPLITS, required=True)
    whose = (
        "whose split to use (default: umd for refcocog, berkeley for refclef, unc for the others; or another whose "
        "refs(...).p is there)"
    )
    add("--split-by", choices=owners, help=whose)
    add("--out", type=Path, required=True, help=out)
    images = (
        "image_root in the configs: look for every image there and in its subfolders, and write the path found "
        "(default: write the name alone, unchecked)"
    )
    add("--image-root", type=Path, metavar="FOLDER", help=images)
    missing = "leave out refs whose image is not below --image-root, and count them (default: stop with an error)"
    add("--skip-missing", action="store_true", help=missing)


def add_detections(commands: Commands) -> None:
    add = add_command(commands, "detections", prepare_detections).add_argument
    add("file", type=Path, help="MAttNet's file of detections")
    add("--out", type=Path, required=True, metavar="FILE", help="the dets.json to write")
    images = "REFER's instances.json: its images without a detection get an empty list (default: no entry)"
    add("--instances", type=Path, metavar="FILE", help=images)


def add_check(commands: Commands) -> None:
    add = add_command(commands, "check", check_configs).add_argument
    count, cores = integer(1), os.cpu_count() or 1
    add("configs", nargs="+", metavar="CONFIG", help="a config of training or evaluation")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in all the configs")
    some = "decode N images only, and read the headers of the others (default: decode all)"
    add("--sample", type=integer(0), metavar="N", help=some)
    add("--workers", type=count, default=cores, metavar="N", help="processes that read images (default: all cores)")
    add(
        "--show", type=count, default=5, metavar="N", help="how many cases to list of each kind of problem (default: 5)"
    )
    add("--json", action="store_true", help="print JSON instead of text")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help="one of the above")
    for add in (add_scenes, add_vg, add_flickr, add_refer, add_refer_train, add_detections, add_check):
        add(commands)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run a command; what killed ones left half written where it writes is removed first."""
    if "out" in args:
        utils.sweep(args.out if args.out.is_dir() else args.out.parent)
    args.run(args)


if __name__ == "__main__":
    utils.run(main, parse_args())
