"""Loading: what a training sample and an evaluation image cost, by part, and how many a second the loaders deliver.

    python benchmarks/bench_data.py            JPEGs of 640 x 480 pixels, the published configs
    python benchmarks/bench_data.py --quick    fewer of them

Decoding, resizing and augmenting are the published operations in the published order, so there is no second variant to
compare with. The numbers tell how many loader processes a device needs to train or evaluate at a given speed.
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.inputs import scene, scenes_tokenizer
from benchmarks.machine import Clock, describe_machine, parser, print_table
from config import AugmentConfig, PretrainConfig
from dataset.transforms import augment_for_albef, augment_for_amc, normalise, resize_bicubic
from dataset.vg import Collate, TrainingData
from grounding.batches import ImageData


def write_images(folder: Path, count: int) -> None:
    """Write scenes as JPEGs, with a training entry each."""
    entries = []
    for i in range(count):
        jpeg, (caption,), _ = scene([11, i], 1)
        (folder / f"{i}.jpg").write_bytes(jpeg)
        entries.append({"image": f"{i}.jpg", "caption": caption, "bbox": [[50, 60, 300, 350]]})
    (folder / "train.json").write_text(json.dumps(entries), encoding="utf-8")


def parts(jpeg: bytes) -> dict[str, Callable[[], object]]:
    """What is done to one image, by name."""

    def decode() -> Image.Image:
        return Image.open(io.BytesIO(jpeg)).convert("RGB")

    rng, options, image = np.random.default_rng(0), AugmentConfig(), decode()
    pixels, resized = np.asarray(image), resize_bicubic(image, 384)
    mask = np.zeros(pixels.shape[:2], np.uint8)
    return {
        "decode": decode,
        "augment for AMC, 256 px": lambda: augment_for_amc(pixels, mask, "a word", options, 256, 256, rng),
        "augment for ALBEF, 256 px": lambda: augment_for_albef(pixels, "a word", options, 256, rng),
        "resize for evaluation, 384 px": lambda: resize_bicubic(image, 384),
        "normalise, 384 px": lambda: normalise(resized),
    }


def rate(batches: Iterable, size: int) -> str:
    """Samples a second over all batches but the first, whose processes have to start."""
    iterator = iter(batches)
    next(iterator)
    started = time.perf_counter()
    count = size * sum(1 for _ in iterator)
    return f"{count / (time.perf_counter() - started):.0f}"


def rates(folder: Path, count: int, batch: int) -> Iterator[list[str]]:
    """One row of the second table per number of loader processes."""
    config = PretrainConfig(train_file=[str(folder / "train.json")], image_root=str(folder))
    collate, paths = Collate(scenes_tokenizer(), config), [folder / f"{i}.jpg" for i in range(count)]
    for workers in (0, 1, 2):
        row = [str(workers or "none beside the program")]
        for add_gcam in (True, False):
            data = TrainingData(config.model_copy(update={"add_gcam": add_gcam}), seed=0)
            row.append(rate(DataLoader(data, batch, collate_fn=collate, num_workers=workers), batch))
        images = ImageData(paths, resize_bicubic, 384, skip_broken=False)
        yield [*row, rate(DataLoader(images, 8, collate_fn=list, num_workers=workers), 8)]


def main(quick: bool) -> None:
    count, batch, rounds = (64, 8, 10) if quick else (768, 32, 100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, count)
        print(describe_machine() + "\n")
        clock = Clock()
        clock.in_turns(parts((folder / "0.jpg").read_bytes()), rounds)
        print_table(["part", "ms"], ([label, f"{1000 * clock.median(label):.2f}"] for label in clock.seconds))
        print()
        heads = ["AMC samples a second", "ALBEF samples a second", "evaluation images a second"]
        print_table(["loader processes", *heads], rates(folder, count, batch))


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true")
    main(options.parse_args().quick)
