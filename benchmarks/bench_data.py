"""Loading: what a training sample and an evaluation image cost, by part, and how many a second the loaders deliver.

    python benchmarks/bench_data.py            JPEGs of about 640 x 480 pixels, the published configs
    python benchmarks/bench_data.py --quick    fewer of them

Decoding, resizing and augmenting are the published operations, in the published order: there is no second variant to
compare with. The question that the numbers answer is how many loader processes a device needs that trains or evaluates
so many samples a second.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_eval import HEIGHT, WIDTH, scenes_tokenizer
from benchmarks.machine import Clock, describe_machine
from config import AugmentConfig, PretrainConfig
from dataset.scenes.language import KINDS, describe, text
from dataset.scenes.world import draw_scene, render
from dataset.transforms import augment_for_albef, augment_for_amc, normalise, resize_bicubic
from dataset.vg import Collate, TrainingData
from grounding.batches import ImageData

WORKERS = (0, 1, 2)


def write_images(folder: Path, count: int) -> None:
    """Scenes as JPEGs, with an AMC training entry each."""
    entries = []
    for i in range(count):
        rng = np.random.default_rng([11, i])
        scene = draw_scene(rng, 560)
        Image.fromarray(render(scene, rng)).resize((WIDTH, HEIGHT)).save(folder / f"{i}.jpg", quality=92)
        spec = describe(scene, 0, KINDS[0], rng)
        caption = text(spec, rng) if spec else "it"
        entries.append({"image": f"{i}.jpg", "caption": caption, "bbox": [[50, 60, 300, 350]]})
    (folder / "train.json").write_text(json.dumps(entries), encoding="utf-8")


def by_part(jpeg: bytes, rounds: int) -> None:
    """Milliseconds of each part for one image; prints a table of medians."""
    clock, options = Clock(), AugmentConfig()
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    mask = np.zeros(pixels.shape[:2], np.uint8)
    for i in range(rounds):
        rng = np.random.default_rng(i)
        with clock.measure("decode"):
            image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        with clock.measure("augment for AMC, 256 px"):
            augment_for_amc(pixels, mask, "a word", options, 256, 256, rng)
        with clock.measure("augment for ALBEF, 256 px"):
            augment_for_albef(pixels, "a word", options, 256, rng)
        with clock.measure("resize for evaluation, 384 px"):
            resized = resize_bicubic(image, 384)
        with clock.measure("normalise, 384 px"):
            normalise(resized)
    print("\n| part | ms |\n|---|---:|")
    for label in clock.seconds:
        print(f"| {label} | {1000 * clock.median(label):.2f} |")


def rate(batches: Iterable, size: int) -> float:
    """Samples a second over all batches, the start of the processes left out."""
    iterator = iter(batches)
    next(iterator)
    started, count = time.perf_counter(), 0
    for _ in iterator:
        count += size
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    count, batch = (64, 8) if args.quick else (768, 32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, count)
        print(describe_machine())
        by_part((folder / "0.jpg").read_bytes(), 10 if args.quick else 100)
        config = PretrainConfig(train_file=[str(folder / "train.json")], image_root=name)
        collate = Collate(scenes_tokenizer(), config)
        paths = [folder / f"{i}.jpg" for i in range(count)]
        print("\n| loader processes | AMC samples a second | ALBEF samples a second | evaluation images a second |")
        print("|---|---:|---:|---:|")
        for workers in WORKERS:
            rates = []
            for add_gcam in (True, False):
                data = TrainingData(config.model_copy(update={"add_gcam": add_gcam}), seed=0)
                rates.append(rate(DataLoader(data, batch, collate_fn=collate, num_workers=workers), batch))
            images = ImageData(paths, resize_bicubic, 384, skip_broken=False)
            rates.append(rate(DataLoader(images, 8, collate_fn=list, num_workers=workers), 8))
            print(f"| {workers or 'none beside the program'} | " + " | ".join(f"{value:.0f}" for value in rates) + " |")


if __name__ == "__main__":
    main()
