"""Evaluation: the published procedure against ours, side by side in one run, on the same weights and inputs.

    python benchmarks/bench_eval.py                  full size, both mixes, float32 and bfloat16
    python benchmarks/bench_eval.py --quick          a small model, in seconds
    python benchmarks/bench_eval.py --mixes blip     BLIP in place of ALBEF, as for refcoco
    python benchmarks/bench_eval.py --device cuda    64 images in batches of 16, TF32 as well

Images and phrases are synthetic scenes, weights are random: what is measured does not depend on either. The published
procedure runs on one batch of pairs (it costs the same for every pair), ours on whole images; both from decoded images
to chosen points and boxes. Decoding is timed apart. Rounds of the two alternate; medians are reported.
"""

import argparse
import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import precision
import utils
from benchmarks import published
from benchmarks.inputs import HEIGHT, WIDTH, scene, scenes_tokenizer
from benchmarks.machine import (
    GLIBC_KEEPS,
    Clock,
    count_flop,
    count_launches,
    default_precisions,
    describe_machine,
    device_name,
    device_parser,
    print_table,
    share_of_peak,
    write_trace,
)
from config import GroundingConfig, load_config
from dataset.text import Tokenizer, Tokens
from dataset.transforms import normalise, resize_bicubic
from grounding import maps, metrics
from grounding.batches import Loaded, answer_pairs
from grounding.explain import Explainer
from grounding.load import build_model
from models.albef import ALBEF


class Mix(NamedTuple):
    """What a benchmark asks: side of the images in pixels, texts an image, how many of them are distinct, the layer."""

    image_res: int
    texts: int
    distinct: int
    layer: int = 8


# Of the phrases of an image of Flickr30k, three in 14 repeat another: an assumption.
MIXES = {"refcoco": Mix(384, 7, 7), "flickr": Mix(256, 14, 11), "blip": Mix(384, 7, 7, layer=6)}
DEFAULTS = {"cpu": {"rounds": 3, "images": 4, "batch": 1, "pairs": 8}}
DEFAULTS["cuda"] = {"rounds": 5, "images": 64, "batch": 16, "pairs": 64}


class Photo(NamedTuple):
    """An image with its texts, and the detections (k, 4) to choose from."""

    jpeg: bytes
    path: Path  # its name alone: there is no such file
    pixels: torch.Tensor
    texts: list[str]
    detections: np.ndarray


def make_photos(mix: Mix, images: int) -> list[Photo]:
    """Scenes with the phrases of a mix and 20 random detections each."""
    photos = []
    for i in range(images):
        jpeg, found, rng = scene([7, i], mix.distinct)
        found += [found[int(rng.integers(mix.distinct))] for _ in range(mix.texts - mix.distinct)]
        boxes = np.concatenate([rng.uniform(0, 300, (20, 2)), rng.uniform(20, 300, (20, 2))], axis=1)
        photos.append(Photo(jpeg, Path(f"{i}.jpg"), decode_pixels(jpeg, mix.image_res), found, boxes))
    return photos


def decode_pixels(jpeg: bytes, image_res: int) -> torch.Tensor:
    return normalise(resize_bicubic(Image.open(io.BytesIO(jpeg)).convert("RGB"), image_res))


# ---- the two procedures: photos -> (point, index of the chosen box or -1) per expression

Choice = tuple[tuple[int, int], int]


def run_published(explainer: Explainer, photos: list[Photo], count: int) -> list[Choice]:
    """The first `count` expressions, as one batch."""
    utils.return_freed_memory(GLIBC_KEEPS)
    model, device = explainer.model, explainer.device
    assert isinstance(model, ALBEF)
    asked = [(photo, phrase) for photo in photos for phrase in photo.texts][:count]
    tokens = Tokens(*(tensor.to(device) for tensor in explainer.tokenizer([phrase for _, phrase in asked])))
    images = torch.stack([photo.pixels for photo, _ in asked]).to(device)
    model.requires_grad_(True)
    with precision.use(explainer.precision, device):
        cams = published.maps(model, images, *tokens, explainer.block).cpu()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    pairs = zip(cams, asked, strict=True)
    return [published.point_and_box(cam, HEIGHT, WIDTH, photo.detections) for cam, (photo, _) in pairs]


def run_ours(explainer: Explainer, photos: list[Photo], batch: int) -> list[Choice]:
    """All expressions, images in batches, as evaluation asks them."""
    utils.keep_freed_memory()
    asked = [(photo, phrase) for photo in photos for phrase in photo.texts]
    images = [Loaded(photo.path, photo.pixels) for photo in photos]
    batches = [images[start : start + batch] for start in range(0, len(images), batch)]
    pairs = [(photo.path, phrase) for photo, phrase in asked]
    chosen = {}
    for position, pred in answer_pairs(explainer.maps, pairs, batches):
        cam = maps.ResizedMap(pred, HEIGHT, WIDTH)
        box = metrics.best_detection(cam, asked[position][0].detections)
        chosen[position] = cam.point(), -1 if box is None else box
    return [chosen[position] for position in range(len(asked))]


# ---- measurements


def compare(mix: Mix, model: ALBEF, fast: ALBEF, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Rounds of the published procedure and of ours in each precision; prints a table."""
    photos, device = make_photos(mix, args.images), next(model.parameters()).device
    asked = [("published", args.precisions[0]), *(("ours", name) for name in args.precisions)]
    calls: dict[str, Callable[[], list[Choice]]] = {}
    for procedure, name in asked:
        explainer = Explainer(fast, tokenizer, device, "itm", mix.layer, name)
        calls[f"{procedure}, {name}"] = functools.partial(run_ours, explainer, photos, args.batch)
        if procedure == "published":
            explainer = explainer._replace(model=model)
            calls[f"{procedure}, {name}"] = functools.partial(run_published, explainer, photos, args.pairs)
    clock = Clock(device)
    answers = clock.in_turns(calls, args.rounds + 1)  # the first call of a library is slow
    each = {label: clock.median(label, skip=1) / len(chosen) for label, chosen in answers.items()}
    flop = flop_of(Explainer(model, tokenizer, device, "itm", mix.layer), photos[0])
    if args.profile:
        for label, call in calls.items():
            write_trace(call, device, args.profile, f"eval {mix.image_res} {label}")

    def row(label: str) -> list[str]:
        first = next(iter(answers))
        pairs = list(zip(answers[first], answers[label], strict=False))
        same = [f"{sum(a[i] == b[i] for a, b in pairs)}/{len(pairs)}" for i in (0, 1)]
        share = share_of_peak(flop / mix.texts, each[label], device_name(device), label.split()[-1], args.peak_tflops)
        counted, ratio = count_launches(calls[label], device), each[first] / each[label]
        images = f"{1 / (each[label] * mix.texts):.4g}"
        asks = [f"{number / len(answers[label]):.1f}" for number in counted]
        return [label, f"{each[label]:.4f}", images, f"{ratio:.1f}", share, *asks, f"{clock.memory[label]:.1f}", *same]

    print(
        f"{mix.image_res} px, {mix.texts} expressions an image, {args.images} images in batches of {args.batch}, ",
        end="",
    )
    print(
        f"{flop / 1e9:.4g} GFLOP an image, {args.rounds} rounds after a first one; launches and waits an expression\n"
    )
    heads = ["", "s per expression", "images/s", "ratio", "of the peak", "launches", "waits", "peak memory, GB"]
    print_table([*heads, "same points", "same boxes"], map(row, answers))


def flop_of(explainer: Explainer, photo: Photo) -> int:
    """FLOP of ours for one image with its texts."""
    assert isinstance(explainer.model, ALBEF)
    explainer.model.requires_grad_(True)  # the counter's hooks want no attention that is a leaf
    flop = count_flop(lambda: run_ours(explainer, [photo], 1))
    explainer.model.requires_grad_(False)
    return flop


def by_part(mix: Mix, model: ALBEF, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Each part of ours, in the first precision; prints a table of medians."""
    device, name, asked = next(model.parameters()).device, args.precisions[0], ("itm", mix.layer)
    explainer = Explainer(model, tokenizer, device, *asked, name)
    clock, photos = Clock(device), make_photos(mix, (args.rounds + 1) * args.batch)
    for start in range(0, len(photos), args.batch):
        batch = photos[start : start + args.batch]
        texts = [(row, text) for row, photo in enumerate(batch) for text in dict.fromkeys(photo.texts)]
        with clock.measure("loading"):
            pixels = torch.stack([decode_pixels(photo.jpeg, mix.image_res) for photo in batch])
        with precision.use(name, device):
            with clock.measure("image encoder, keys and values"):
                encoded = model.encode(pixels.to(device), precision.DTYPES[name], only=asked)
            with clock.measure("text, fusion and gradient"):
                chunks = explainer.chunks([text for _, text in texts], [row for row, _ in texts])
                cams = torch.cat([model.explain(encoded, *chunk, *asked).maps.cpu() for chunk in chunks])
        with clock.measure("map, point and box"):
            for (row, _), cam in zip(texts, cams, strict=True):
                resized = maps.ResizedMap(cam, HEIGHT, WIDTH)
                resized.point()
                metrics.best_detection(resized, batch[row].detections)
    medians = {label: clock.median(label, skip=1) / args.batch for label in clock.seconds}
    total = sum(medians.values()) - medians["loading"]
    what = f"by part: {name}, batches of {args.batch}, {mix.texts} expressions an image"
    print(f"{what}; loading runs beside, in other processes\n")
    shares = {label: f"{100 * value / total:.1f}%" for label, value in medians.items()} | {"loading": "-"}
    rows = ([label, f"{1000 * value:.1f}", shares[label]] for label, value in medians.items())
    print_table(["part", "ms per image", "share"], rows)


def main(args: argparse.Namespace) -> None:
    device = utils.choose_device(args.device)
    for name, value in DEFAULTS[device.type].items():
        setattr(args, name, getattr(args, name) or value)
    args.precisions = args.precisions or default_precisions(device)
    torch.manual_seed(0)
    tokenizer = scenes_tokenizer()
    print(describe_machine(device))
    folder = Path(__file__).parents[1] / "configs"
    for name in args.mixes:
        config = load_config(folder / ("scenes" if args.quick else "") / f"Grounding_{name}.yaml", GroundingConfig)
        model = build_model(config).eval().requires_grad_(False).to(device)
        fast = published.fast_copy(model)
        mix = MIXES[name]._replace(image_res=96, layer=config.block_num) if args.quick else MIXES[name]
        print(f"\n{name}: ", end="")
        compare(mix, model, fast, tokenizer, args)
        print(f"\n{name}, ", end="")
        by_part(mix, fast, tokenizer, args)
    if args.profile:
        print(f"\ntraces: {args.profile}/*.json; open them in https://ui.perfetto.dev")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    options = device_parser(__doc__)
    options.add_argument("--mixes", nargs="+", choices=MIXES, default=["refcoco", "flickr"], help="blip: BLIP")
    options.add_argument("--rounds", type=int, help="after a first one (default: 3 on the CPU, 5 on a GPU)")
    options.add_argument("--images", type=int, help="images per round of ours (default: 4 and 64)")
    options.add_argument("--batch", type=int, help="images per batch of ours (default: 1 and 16)")
    options.add_argument("--pairs", type=int, help="pairs in the published batch (default: 8 and 64)")
    return options.parse_args(argv)


if __name__ == "__main__":
    utils.run(main, parse_args())
