"""Evaluation: the published procedure against ours, side by side in one run, on the same weights and inputs.

    python benchmarks/bench_eval.py            full size, both mixes, float32 and bfloat16
    python benchmarks/bench_eval.py --quick    a small model, in seconds

Images and phrases are synthetic scenes, weights are random: what is measured does not depend on either. The published
procedure runs on one batch of 8 pairs (it costs the same for every pair), ours on whole images; both from decoded
images to chosen points and boxes. Decoding is timed apart. Rounds of the two alternate; medians are reported.
"""

import argparse
import functools
import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from benchmarks import published
from benchmarks.inputs import HEIGHT, WIDTH, scene, scenes_tokenizer
from benchmarks.machine import GLIBC_KEEPS, Clock, describe_machine, parser, print_table
from config import GroundingConfig, load_config
from dataset.text import Tokenizer
from dataset.transforms import normalise, resize_bicubic
from grounding import maps, metrics
from grounding.batches import Loaded, answer_pairs
from grounding.explain import Explainer
from models.albef import ALBEF, build_albef


class Mix(NamedTuple):
    """What a benchmark asks: side of the images in pixels, texts an image, how many of them are distinct, the layer."""

    image_res: int
    texts: int
    distinct: int
    layer: int = 8


# Of the phrases of an image of Flickr30k, three in 14 repeat another: an assumption.
MIXES = {"refcoco": Mix(384, 7, 7), "flickr": Mix(256, 14, 11)}
PUBLISHED_BATCH = 8


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


def run_published(model: ALBEF, tokenizer: Tokenizer, layer: int, photos: list[Photo]) -> list[Choice]:
    """The first batch of expressions."""
    utils.return_freed_memory(GLIBC_KEEPS)
    asked = [(photo, phrase) for photo in photos for phrase in photo.texts][:PUBLISHED_BATCH]
    tokens = tokenizer([phrase for _, phrase in asked])
    images = torch.stack([photo.pixels for photo, _ in asked])
    cams = published.maps(model, images, tokens.input_ids, tokens.attention_mask, layer)
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
    """Rounds of the published procedure, ours in float32 and ours in bfloat16; prints a table."""
    layer, photos, device = mix.layer, make_photos(mix, args.images), torch.device("cpu")

    def baseline() -> list[Choice]:
        model.requires_grad_(True)
        chosen = run_published(model, tokenizer, layer, photos)
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        return chosen

    calls = {"published": baseline}
    for label, precision in {"ours, fp32": torch.float32, "ours, bf16 image encoder": torch.bfloat16}.items():
        explainer = Explainer(fast, tokenizer, device, "itm", layer, precision)
        run_ours(explainer, photos[:1], 1)  # the first call of a library is slow
        calls[label] = functools.partial(run_ours, explainer, photos, args.batch)
    clock = Clock()
    answers = clock.in_turns(calls, args.rounds)
    each = {label: clock.median(label) / len(chosen) for label, chosen in answers.items()}

    def row(label: str) -> list[str]:
        pairs = list(zip(answers["published"], answers[label], strict=False))
        same = [f"{sum(a[i] == b[i] for a, b in pairs)}/{len(pairs)}" for i in (0, 1)]
        ratio = each["published"] / each[label]
        return [label, f"{each[label]:.3f}", f"{ratio:.1f}", f"{clock.memory[label]:.1f}", *same]

    print(f"{mix.image_res} px, {mix.texts} expressions an image, {args.images} images, {args.rounds} rounds\n")
    print_table(["", "s per expression", "ratio", "peak memory, GB", "same points", "same boxes"], map(row, answers))


def profile(mix: Mix, model: ALBEF, tokenizer: Tokenizer, rounds: int) -> None:
    """Each part of ours, one image at a time; prints a table of medians."""
    clock = Clock()
    for photo in make_photos(mix, rounds + 1):
        tokens = tokenizer(list(dict.fromkeys(photo.texts)))
        with clock.measure("loading"):
            pixels = decode_pixels(photo.jpeg, mix.image_res)
        with clock.measure("image encoder, keys and values"):
            encoded = model.encode(pixels[None], only=("itm", mix.layer))
        with clock.measure("text, fusion and gradient"):
            found = model.explain(encoded, None, tokens, "itm", mix.layer)
        with clock.measure("map, point and box"):
            for cam in found.maps:
                resized = maps.ResizedMap(cam, HEIGHT, WIDTH)
                resized.point()
                metrics.best_detection(resized, photo.detections)
    medians = {label: clock.median(label, skip=1) for label in clock.seconds}
    total = sum(medians.values()) - medians["loading"]
    print(f"by part: one image of {mix.texts} expressions at a time; loading runs beside, in other processes\n")
    shares = {label: f"{100 * value / total:.1f}%" for label, value in medians.items()} | {"loading": "-"}
    rows = ([label, f"{1000 * value:.1f}", shares[label]] for label, value in medians.items())
    print_table(["part", "ms per image", "share"], rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="the small model of the scenes")
    options.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--images", type=int, default=4, help="images per round of ours")
    options.add_argument("--batch", type=int, default=1, help="images per batch")
    args = options.parse_args()
    torch.manual_seed(0)
    tokenizer = scenes_tokenizer()
    print(describe_machine())
    folder = Path(__file__).parents[1] / "configs"
    for name in args.mixes:
        config = load_config(folder / ("scenes" if args.quick else "") / f"Grounding_{name}.yaml", GroundingConfig)
        model = build_albef(config).eval().requires_grad_(False)
        fast = published.fast_copy(model)
        mix = MIXES[name]._replace(image_res=96, layer=3) if args.quick else MIXES[name]
        print(f"\n{name}: ", end="")
        compare(mix, model, fast, tokenizer, args)
        print(f"\n{name}, ", end="")
        profile(mix, fast, tokenizer, args.rounds)


if __name__ == "__main__":
    main()
