"""Show where a model finds phrases in images: heat maps, points, boxes, match probabilities.

    python demo.py IMAGE PHRASE [PHRASE ...]                     one image (or a folder, or a "pattern*.jpg")
    python demo.py --images A.jpg B.jpg FOLDER --phrase PHRASE [--phrase PHRASE ...]
    python demo.py --web                                         the same on a page in the browser (docs/web.md)

    python demo.py docs/images/scenes/100000.jpg "the small red triangle"                    to try it at once

Without --checkpoint, the model is the AMC model of the synthetic scenes: the one that `make demo` trained, or else the
one that ships. It knows nothing of photographs. Pictures go to --output_dir as IMAGE_01_PHRASE.png; docs/demo.md shows
one.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import precision
import utils
from dataset.photos import find_images, read_photo
from dataset.reading import SKIP, DataError
from dataset.scenes.paths import DEMO_AMC, SHIPPED_AMC
from grounding import maps, metrics
from grounding.benchmarks import BENCHMARKS
from grounding.evaluate import EXTENT
from grounding.explain import Explainer, Grounding, encode, ground_all, notes
from grounding.load import OpenedModel, open_model
from grounding.maps import THRESHOLD, check_threshold
from grounding.pictures.overlay import overlay, slug, word_strip
from grounding.pictures.render import COLORMAP, save, see_through
from grounding.web import server
from grounding.web.examples import Start, examples, offered
from grounding.web.session import Answers
from runs import newest_checkpoint


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show where a model finds phrases in images.",
        epilog="The default model knows drawn scenes alone (docs/images/scenes, data/scenes/images), not photographs.",
    )
    add = parser.add_argument
    add("image_and_phrases", nargs="*", metavar="IMAGE PHRASE", help="an image, folder or quoted pattern, then phrases")
    add("--images", nargs="+", default=[], metavar="IMAGE", help="images, folders or patterns, in place of IMAGE")
    add("--phrase", action="append", default=[], help="a phrase to find; may be repeated")
    model = "the model: a file, a folder of export.py or its name on the hub"
    add("--checkpoint", help=f"{model} (default: the last one in {DEMO_AMC}, or else {SHIPPED_AMC})")
    add("--config", help="a Grounding_*.yaml (default: the one that fits the sizes stated in the checkpoint)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key, for instance image_res")
    add(
        "--benchmark",
        choices=BENCHMARKS,
        type=lambda name: "refcoco+" if name == "refcoco" else name,  # what refcoco has always meant here
        default="refcoco+",
        help="benchmark whose config and image resize to use",
    )
    add("--text_encoder", help="hub name or folder (default: the checkpoint's, the scenes' or bert-base-uncased)")
    add("--device", help="cuda or cpu (default: the GPU if there is one)")
    add("--gradcam_mode", choices=("itm", "itc"), default="itm", help="explain the matching head or the contrast")
    add("--block_num", type=int, help="layer to explain (default: the config's, 8)")
    precision.add_options(parser, "fp32", EXTENT)
    add("--threshold", type=float, default=THRESHOLD, help="boxes enclose at least this share of the map's maximum")
    add("--skip_broken", action="store_true", help="skip missing and unreadable images, and say which")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("output/demo"), help="folder to write to (default: %(default)s)")
    add("--box", nargs=4, type=float, action="append", default=[], metavar=("X", "Y", "W", "H"), help="a true box")
    add("--colormap", default=COLORMAP, help="a colour map of matplotlib: viridis, magma, jet, ...")
    add("--word_maps", "--words", action="store_true", help="draw the map of each word too, in a second picture")
    add("--json", action="store_true", help="write IMAGE.json: points, boxes, scores, probabilities")
    add("--npz", action="store_true", help="write IMAGE.npz: the maps themselves")
    add = parser.add_argument_group("page in the browser (needs requirements-web.txt)").add_argument
    add("--web", action="store_true", help="serve the page; images and phrases are chosen there")
    add(
        "--checkpoints",
        nargs="+",
        default=[],
        metavar="FILE",
        help="models to offer (default: the shipped ones, and those of `make demo`)",
    )
    add("--host", default=server.LOOPBACK[0], help="address to serve at (default: this machine alone)")
    add("--port", type=int, help="port to serve at (default: 7860, or the next free one)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    see_through(args.colormap)  # a wrong option is reported before the model is read
    check_threshold(args.threshold)
    device = utils.choose_device(args.device)
    args.device = str(device)
    args.precision = precision.choose(args.precision, device, args.force_precision)
    if args.web:
        serve_page(args)
        return
    images, phrases = what_to_ask(args)
    opened = open_as_asked(args, args.checkpoint or demo_model(), args.config)
    explainer = opened.explainer(args.gradcam_mode, args.block_num, args.precision)
    print(opened.report)
    print(f"config: {opened.origin}; {args.gradcam_mode} at layer {explainer.block}")
    for phrase in phrases:
        for note in notes(explainer, phrase):
            print(f"note: phrase {phrase!r}: {note}")
    broken = 0
    for path, name in file_names(images).items():
        try:
            image = read_photo(path)
        except DataError as error:
            if not args.skip_broken:
                raise DataError(f"{error}{SKIP}") from None
            print(f"skipped: {error}")
            broken += 1
        else:
            ask_one(args, opened, explainer, image, path, name, phrases)
    if broken == len(images):
        raise DataError("none of the images could be read")
    if broken:
        print(f"{broken} of {len(images)} images could not be read and were left out")


def serve_page(args: argparse.Namespace) -> None:
    """Serve the page of docs/web.md until interrupted; raises `UserError` for a command line that does not fit it."""
    if args.image_and_phrases or args.images or args.phrase or args.box:
        raise utils.UserError("--web: images and phrases are chosen on the page; leave them out of the command")
    answers = Answers(
        offered([*filter(None, [args.checkpoint]), *args.checkpoints], args.config),
        lambda offer: open_as_asked(args, offer.checkpoint, offer.config),
        BENCHMARKS[args.benchmark].resize,
        precision=args.precision,
    )
    if args.block_num is not None:
        answers.check_layer(args.gradcam_mode, args.block_num)
    start = Start(args.gradcam_mode, args.block_num, args.threshold, args.colormap)
    server.serve(answers, examples(), args.host, args.port, start)


def open_as_asked(args: argparse.Namespace, checkpoint: str | Path, config: str | None) -> OpenedModel:
    """A checkpoint, opened by the command line's other options."""
    return open_model(checkpoint, config, args.text_encoder, args.device, args.set, BENCHMARKS[args.benchmark])


def what_to_ask(args: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The images and phrases of a command line; raises `UserError` where it says too little or too much."""
    if args.images and args.image_and_phrases:
        raise utils.UserError(
            f"{args.image_and_phrases[0]!r}: do not mix a positional image with --images; pass phrases by --phrase"
        )
    if args.checkpoints:
        raise utils.UserError("--checkpoints belongs to --web; one --checkpoint answers on the command line")
    named = args.images or args.image_and_phrases[:1]
    phrases = [*args.image_and_phrases[1:], *args.phrase]
    if not named or not phrases:
        what = "a phrase is" if named else "an image is" if phrases else "an image and a phrase are"
        raise utils.UserError(f'{what} missing: python demo.py IMAGE "the dog on the left"')
    remedy = "beside --images, phrases are given by --phrase" if args.images else "the image comes first, then phrases"
    images = find_images(named, remedy, args.skip_broken)
    if args.box and len(images) > 1:
        raise utils.UserError(f"--box belongs to one image, and there are {len(images)}")
    return images, phrases


def demo_model() -> Path:
    """The AMC model that `make demo` trained; before that, the one that ships."""
    found = newest_checkpoint(DEMO_AMC)
    origin = "which `make demo` trained" if found else "which ships with the repository"
    print(f"checkpoint: {found or SHIPPED_AMC}, {origin}; made for synthetic scenes, it knows nothing of photographs")
    return found or SHIPPED_AMC


def file_names(images: Sequence[Path]) -> dict[Path, str]:
    """A name for each image's files: its own without the suffix, and a number where several would share one."""
    names: dict[Path, str] = {}
    used: set[str] = set()  # in lower case: some file systems do not tell A from a
    for path in images:
        numbered = (path.stem if number == 1 else f"{path.stem}-{number}" for number in itertools.count(1))
        names[path] = next(name for name in numbered if name.lower() not in used)
        used.add(names[path].lower())
    return names


# ---- one image


def ask_one(
    args: argparse.Namespace,
    opened: OpenedModel,
    explainer: Explainer,
    image: Image.Image,
    path: Path,
    name: str,
    phrases: Sequence[str],
) -> None:
    """Ground all phrases in one image; draw, write and print the results."""
    check_boxes(args.box, image, path)
    encoded = encode(explainer, image, BENCHMARKS[args.benchmark].resize)
    rows = []
    found = ground_all(explainer, encoded, phrases, args.threshold)
    for number, one in enumerate(found, start=1):
        picture = args.output_dir / f"{name}_{number:02d}_{slug(one.text)}.png"
        save(overlay(image, one, args.box, args.colormap), picture)
        if args.word_maps:
            save(word_strip(image, one, args.colormap), picture.with_name(f"{picture.stem}_words.png"))
        rows.append({**record(one), **against_truth(one, args.box), "picture": picture.name})
        box = f"box {list(one.boxes[0].box)}" if one.boxes else "no box (the map is 0 everywhere)"
        print(f"{path}: {one.text!r}: match {one.match:.3f}, point {list(one.point)}, {box}: {picture}")
    if args.json:
        about = {
            "image": str(path),
            "height": image.height,
            "width": image.width,
            "checkpoint": opened.report.path,
            "config": opened.origin,
            "image_res": opened.config.image_res,
            "resize": BENCHMARKS[args.benchmark].name,
            "gradcam_mode": explainer.mode,
            "block_num": explainer.block,
            "precision": args.precision,
            "threshold": args.threshold,
        }
        text = json.dumps({**about, "phrases": rows}, indent=2, ensure_ascii=False)
        utils.write_text(args.output_dir / f"{name}.json", text + "\n")
    if args.npz:
        write_maps(args.output_dir / f"{name}.npz", found)


def check_boxes(boxes: Sequence[Sequence[float]], image: Image.Image, path: Path) -> None:
    """Raise `UserError` for a true box that has no area, or none in the image."""
    for x, y, w, h in boxes:
        if not (w > 0 and h > 0 and x < image.width and y < image.height and x + w > 0 and y + h > 0):
            raise utils.UserError(
                f"--box {x:g} {y:g} {w:g} {h:g}: covers nothing of {path}, which is {image.width} pixels wide and "
                f"{image.height} high; give x, y of the upper left corner, width and height"
            )


def record(found: Grounding) -> dict[str, Any]:
    """A phrase's answer as JSON; boxes are [x, y, w, h] in pixels of the upright image."""
    answer = {key: getattr(found, key) for key in ("phrase", "text", "match", "point")}
    words = [{"word": word.word, "pieces": word.pieces, "share": word.share} for word in found.words]
    return {**answer, "boxes": [box._asdict() for box in found.boxes], "words": words}


def against_truth(found: Grounding, truth: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Whether the point is right by the pointing game, and the best box's IoU, if there are true boxes."""
    if not truth:
        return {}
    cam = maps.ResizedMap(torch.from_numpy(found.small), *found.map.shape)
    overlaps = [metrics.iou(box.box, true) for box in found.boxes[:1] for true in truth]
    return {
        "truth": truth,
        "point_correct": metrics.point_correct(cam, np.array(truth)),
        "best_box_iou": max(overlaps, default=0.0),
    }


def write_maps(path: Path, found: Sequence[Grounding]) -> None:
    """The maps of an image's phrases: of the first, map_01 (height, width), small_01 (h, w), words_01 (words, h, w)."""
    arrays: dict[str, Any] = {"phrases": np.array([one.phrase for one in found])}
    for number, one in enumerate(found, start=1):
        arrays[f"map_{number:02d}"] = one.map
        arrays[f"small_{number:02d}"] = one.small
        if one.words:
            arrays[f"words_{number:02d}"] = np.stack([word.small for word in one.words])
    with utils.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    utils.run(main, parse_args())
