"""Evaluation: the published procedure against ours, side by side in one run, on the same weights and inputs.

    python benchmarks/bench_eval.py                          full size, both mixes, float32 and bfloat16
    python benchmarks/bench_eval.py --mixes refcoco --sweep  how cost falls with expressions per image
    python benchmarks/bench_eval.py --quick                  a small model, in seconds

Images and phrases are synthetic scenes, weights are random: what is measured does not depend on either. The published
procedure runs on one batch of 8 pairs (it costs the same for every pair), ours on whole images; both from decoded
images to chosen points and boxes. Decoding is timed apart. Rounds of the two alternate; medians are reported.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import published
from benchmarks.machine import Clock, describe_machine
from config import GroundingConfig, load_config
from dataset.scenes.files import vocabulary
from dataset.scenes.language import KINDS, describe, text
from dataset.scenes.world import draw_scene, render
from dataset.text import Tokenizer, load_tokenizer
from dataset.transforms import normalise, resize_bicubic
from grounding import maps, metrics
from grounding.explain import Explainer
from models.albef import ALBEF, build_albef

MIXES = {"refcoco": (384, 7), "flickr": (256, 14)}  # image_res, expressions per image
DISTINCT = {"flickr": 11}  # equal strings among an image's phrases; an assumption, of every 14 three are repetitions
PUBLISHED_BATCH = 8
WIDTH, HEIGHT = 640, 480


class Case(NamedTuple):
    """An image with its texts, and the detections (k, 4) to choose from."""

    jpeg: bytes
    pixels: torch.Tensor
    texts: list[str]
    detections: np.ndarray


def make_cases(images: int, texts: int, distinct: int, image_res: int) -> list[Case]:
    """Scenes as JPEGs of about 640 x 480 pixels, with phrases of one of four kinds in turn."""
    cases = []
    for i in range(images):
        rng = np.random.default_rng([7, i])
        scene = draw_scene(rng, 560)
        found: list[str] = []
        while len(found) < distinct:
            spec = describe(scene, int(rng.integers(len(scene.things))), KINDS[len(found) % 4], rng)
            phrase = text(spec, rng) if spec else f"the thing {len(found)}"
            found += [phrase] if phrase not in found else []
        found += [found[int(rng.integers(distinct))] for _ in range(texts - distinct)]
        buffer = io.BytesIO()
        Image.fromarray(render(scene, rng)).resize((WIDTH, HEIGHT)).save(buffer, "JPEG", quality=92)
        boxes = np.concatenate([rng.uniform(0, 300, (20, 2)), rng.uniform(20, 300, (20, 2))], axis=1)
        cases.append(Case(buffer.getvalue(), decode(buffer.getvalue(), image_res), found, boxes))
    return cases


def decode(jpeg: bytes, image_res: int) -> torch.Tensor:
    return normalise(resize_bicubic(Image.open(io.BytesIO(jpeg)).convert("RGB"), image_res))


def scenes_tokenizer() -> Tokenizer:
    """The words of the scenes; their ids are within BERT's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
        return load_tokenizer(folder)


# ---- the two procedures: cases -> (point, index of the chosen box) per expression


def run_published(model: ALBEF, tokenizer: Tokenizer, layer: int, cases: list[Case], pairs: int) -> list[Any]:
    """The first `pairs` expressions, in batches of 8."""
    asked = [(case, phrase) for case in cases for phrase in case.texts][:pairs]
    chosen = []
    for start in range(0, len(asked), PUBLISHED_BATCH):
        batch = asked[start : start + PUBLISHED_BATCH]
        tokens = tokenizer([phrase for _, phrase in batch])
        images = torch.stack([case.pixels for case, _ in batch])
        cams = published.maps(model, images, tokens.input_ids, tokens.attention_mask, layer)
        for cam, (case, _) in zip(cams, batch, strict=True):
            chosen.append(published.point_and_box(cam, HEIGHT, WIDTH, case.detections))
    return chosen


def run_ours(explainer: Explainer, cases: list[Case], batch: int) -> list[Any]:
    """All expressions, images in batches."""
    chosen = []
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        asked = list(dict.fromkeys((row, phrase) for row, case in enumerate(part) for phrase in case.texts))
        images = torch.stack([case.pixels for case in part])
        cams = explainer.maps(images, [row for row, _ in asked], [phrase for _, phrase in asked])
        cam_of = dict(zip(asked, cams, strict=True))
        for row, case in enumerate(part):
            for phrase in case.texts:
                cam = maps.ResizedMap(cam_of[row, phrase], HEIGHT, WIDTH)
                box = metrics.best_detection(cam, case.detections)
                chosen.append((cam.point(), -1 if box is None else box))
    return chosen


# ---- measurements


def compare(name: str, model: ALBEF, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Rounds of the published procedure, ours in float32 and ours in bfloat16; prints a table."""
    image_res, layer = sizes(name, args)
    texts = MIXES[name][1]
    cases = make_cases(args.images, texts, DISTINCT.get(name, texts), image_res)
    count = sum(len(case.texts) for case in cases)
    precisions = {"ours, fp32": torch.float32, "ours, bf16 image encoder": torch.bfloat16}
    fast = published.with_onednn(model)
    explainers = {
        label: Explainer(fast, tokenizer, torch.device("cpu"), "itm", layer, precision)
        for label, precision in precisions.items()
    }
    for explainer in explainers.values():
        run_ours(explainer, cases[:1], 1)  # the first call of a library is slow
    clock, answers, handled = Clock(), {}, {"published": PUBLISHED_BATCH} | dict.fromkeys(explainers, count)
    for _ in range(args.rounds):
        model.requires_grad_(True)
        with clock.measure("published"):
            answers["published"] = run_published(model, tokenizer, layer, cases, PUBLISHED_BATCH)
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        for label, explainer in explainers.items():
            with clock.measure(label):
                answers[label] = run_ours(explainer, cases, args.batch)
    print(f"\n{name}: {image_res} px, {texts} expressions an image, {args.images} images, {args.rounds} rounds\n")
    print("| | s per expression | ratio | peak memory, GB | same points | same boxes |\n|---|---:|---:|---:|---:|---:|")
    for label, expressions in handled.items():
        each = clock.median(label) / expressions
        ratio = clock.median("published") / PUBLISHED_BATCH / each
        pairs = list(zip(answers["published"], answers[label], strict=False))
        points, boxes = (f"{sum(a[i] == b[i] for a, b in pairs)}/{len(pairs)}" for i in (0, 1))
        print(f"| {label} | {each:.3f} | {ratio:.1f} | {clock.memory[label]:.1f} | {points} | {boxes} |")


def profile(name: str, model: ALBEF, tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, float]:
    """Each part of ours, one image at a time; prints a table of medians, and returns them in seconds."""
    image_res, layer = sizes(name, args)
    texts = MIXES[name][1]
    cases = make_cases(args.rounds + 1, texts, DISTINCT.get(name, texts), image_res)
    model = published.with_onednn(model)
    clock = Clock()
    for case in cases:
        tokens = tokenizer(list(dict.fromkeys(case.texts)))
        with clock.measure("loading"):
            pixels = decode(case.jpeg, image_res)
        with clock.measure("image encoder, keys and values"):
            encoded = model.encode(pixels[None], only=("itm", layer))
        with clock.measure("text, fusion and gradient"):
            found = model.explain(encoded, None, tokens, "itm", layer)
        with clock.measure("map, point and box"):
            for cam in found.maps:
                resized = maps.ResizedMap(cam, HEIGHT, WIDTH)
                resized.point()
                metrics.best_detection(resized, case.detections)
    medians = {label: clock.median(label, skip=1) for label in clock.seconds}
    total = sum(medians.values()) - medians["loading"]
    print(f"\n{name}, by part: one image of {texts} expressions at a time; loading runs beside, in other processes\n")
    print("| part | ms per image | share |\n|---|---:|---:|")
    for label, value in medians.items():
        print(f"| {label} | {1000 * value:.1f} | {'-' if label == 'loading' else f'{100 * value / total:.1f}%'} |")
    return medians


def sweep(config: GroundingConfig, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Cost per expression against expressions per image, for image encoders of several sizes; prints a table."""
    image_res, layer = sizes("refcoco", args)
    counts = (1, 2, 4, 8, 16)
    print(
        f"\nBy expressions per image and size of the image encoder, {image_res} px: s per expression, and its share\n"
    )
    print("| image encoder | " + " | ".join(map(str, counts)) + " |\n|---|" + "---:|" * len(counts))
    for name, depth in {"half the layers": config.vision_depth // 2, "all layers": config.vision_depth}.items():
        model = published.with_onednn(build_albef(config.model_copy(update={"vision_depth": depth})).eval())
        explainer = Explainer(model.requires_grad_(False), tokenizer, torch.device("cpu"), "itm", layer)
        cells = []
        for texts in counts:
            cases, clock = make_cases(2, texts, texts, image_res), Clock()
            run_ours(explainer, cases, args.batch)
            for _ in range(args.rounds):
                with clock.measure("all"):
                    run_ours(explainer, cases, args.batch)
                with clock.measure("image encoder"), torch.no_grad():
                    for case in cases:
                        model.encode_image(case.pixels[None])
            share = clock.median("image encoder") / clock.median("all")
            cells.append(f"{clock.median('all') / (2 * texts):.3f}, {100 * share:.0f}%")
        print(f"| {name} ({depth}) | " + " | ".join(cells) + " |")


def draw(parts: dict[str, dict[str, float]], path: Path) -> None:
    """The profiles as one stacked bar a mix, milliseconds per image."""
    figure = Figure(figsize=(8, 1 + len(parts)), layout="constrained")
    axes = figure.subplots()
    labels = list(next(iter(parts.values())))
    left = np.zeros(len(parts))
    for label in labels:
        widths = np.array([1000 * profile[label] for profile in parts.values()])
        axes.barh(list(parts), widths, left=left, label=label)
        left += widths
    axes.set_xlabel("ms per image")
    axes.legend(ncols=3, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=120)


def sizes(name: str, args: argparse.Namespace) -> tuple[int, int]:
    """Side of the images, and the GradCAM layer."""
    return (96, 3) if args.quick else (MIXES[name][0], 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model of the scenes")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4, help="images of a round of ours")
    parser.add_argument("--batch", type=int, default=1, help="images a batch")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the profiles by part")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = scenes_tokenizer()
    print(describe_machine())
    folder = Path(__file__).parents[1] / "configs"
    parts: dict[str, dict[str, float]] = {}
    for name in args.mixes:
        config = load_config(folder / ("scenes" if args.quick else "") / f"Grounding_{name}.yaml", GroundingConfig)
        model = build_albef(config).eval().requires_grad_(False)
        compare(name, model, tokenizer, args)
        parts[name] = profile(name, model, tokenizer, args)
        if args.sweep and name == "refcoco":
            sweep(config, tokenizer, args)
    if args.plot:
        draw(parts, args.plot)


if __name__ == "__main__":
    main()
