"""Loading: what a training sample and an evaluation image cost, by part, and how many a second the loaders deliver.

    python benchmarks/bench_data.py                      JPEGs of 640 x 480 pixels, the published configs
    python benchmarks/bench_data.py --quick              fewer of them
    python benchmarks/bench_data.py --entries 5000000    instead: memory and time that so many training entries take

Decoding, resizing and augmenting are the published operations in the published order, so there is no second variant to
compare with. The numbers tell how many loader processes a device needs to train or evaluate at a given speed.
"""

import argparse
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.inputs import scene, scenes_tokenizer
from benchmarks.machine import Clock, describe_machine, parser, peak_memory, print_table
from config import AugmentConfig, PretrainConfig
from dataset.loader.workers import EpochOrder, spare_memory
from dataset.transforms import augment_for_albef, augment_for_amc, normalise, normalise_batch, resize_bicubic
from dataset.vg import Collate, TrainingData, packed_entries
from grounding.batches import ImageData

SMAPS = Path("/proc/self/smaps_rollup")
PER_IMAGE = 50  # entries, as in Visual Genome
LOOKUPS = 200_000


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
    mask, batch = np.zeros(pixels.shape[:2], np.uint8), torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    return {
        "decode": decode,
        "augment for AMC, 256 px": lambda: augment_for_amc(pixels, mask, "a word", options, 256, 256, rng),
        "augment for ALBEF, 256 px": lambda: augment_for_albef(pixels, "a word", options, 256, rng),
        "resize for evaluation, 384 px": lambda: resize_bicubic(image, 384),
        "normalise for evaluation, 384 px": lambda: normalise(resized),
        "normalise for training, 256 px, on the device": lambda: normalise_batch(batch),
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


# ---- many training entries


def write_annotations(folder: Path, count: int) -> PretrainConfig:
    """Write a training file of so many entries, and an empty file for each image."""
    words = np.array(["a", "big", "brown", "dog", "on", "the", "left", "of", "tree", "with", "red", "hat", "window"])
    rng = np.random.default_rng(0)
    (folder / "images" / "VG_100K").mkdir(parents=True)
    with (folder / "train.json").open("w", encoding="utf-8") as file:
        for first in range(0, count, PER_IMAGE):
            name = f"VG_100K/{2_300_000 + first}.jpg"
            (folder / "images" / name).touch()
            chosen, corners = rng.integers(len(words), size=(PER_IMAGE, 14)), rng.integers(300, size=(PER_IMAGE, 2))
            for row, (x, y) in zip(words[chosen], corners.tolist(), strict=True):
                entry = {"image": name, "caption": " ".join(row), "bbox": [[x, y, x + 90, y + 70], [y, x, 399, 399]]}
                file.write((",\n" if file.tell() else "[\n") + json.dumps(entry))
        file.write("\n]\n")
    return PretrainConfig(train_file=[str(folder / "train.json")], image_root=str(folder / "images"))


def own_memory(*_: object) -> float:
    """Memory in MB that this process shares with no other: what it wrote, and not the pages of a file that it reads."""
    found = re.search(r"Private_Dirty:\s*(\d+)", SMAPS.read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def pack_anew(config: PretrainConfig) -> dict[str, float]:
    """Make packed entries: seconds of the clock and of the processor, and the peak of memory in MB."""
    started, worked = time.perf_counter(), time.process_time()
    packed_entries(config.train_file[0], config, str(Path(config.train_file[0]).parent))
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    return {"seconds": seconds, "processor": processor, "peak": 1000 * peak_memory()}


def start_with_packed(config: PretrainConfig) -> dict[str, float]:
    """Start with packed entries that are there: seconds; MB of this and of a loader process; us a look-up."""
    before, started, worked = own_memory(), time.perf_counter(), time.process_time()
    data = TrainingData(config, seed=0, cache_dir=str(Path(config.train_file[0]).parent))
    order = EpochOrder(len(data), 8, 0, seed=0)
    indices = iter(order)
    found = {"seconds": time.perf_counter() - started, "processor": time.process_time() - worked}
    found |= {"before": before, "after": own_memory()}
    chosen = [next(indices) for _ in range(min(LOOKUPS, len(order)))]
    worked = time.process_time()
    for index in chosen:
        data.entries[index]
    found["lookup"] = 1e6 * (time.process_time() - worked) / len(chosen)
    options: dict[str, Any] = {"multiprocessing_context": "fork", "worker_init_fn": spare_memory}
    memory = list(DataLoader(data.entries, 1000, sampler=chosen, num_workers=1, collate_fn=own_memory, **options))
    return found | {"worker": max(memory), "grown": memory[-1] - memory[0]}


def alone(measure: Callable[[PretrainConfig], dict[str, float]], config: PretrainConfig) -> dict[str, float]:
    """What is measured in a process of its own, that holds nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, config).result()


def annotations(count: int) -> Iterator[list[str]]:
    """The rows of a table on a training file of so many entries."""
    with tempfile.TemporaryDirectory() as name:
        config = write_annotations(Path(name), count)
        made, found = alone(pack_anew, config), alone(start_with_packed, config)
        sizes = {path.suffix: path.stat().st_size for path in Path(name).iterdir() if path.is_file()}
    yield ["the JSON file", f"{sizes['.json'] / 1e9:.2f} GB"]
    yield [
        "packed, once for all processes",
        f"{sizes['.packed'] / 1e9:.2f} GB, {sizes['.packed'] / count:.0f} bytes an entry",
    ]
    yield ["packing, once", f"{made['seconds']:.0f} s, of the processor {made['processor']:.0f} s"]
    yield ["memory of the process that packs, at most", f"{made['peak']:.0f} MB"]
    yield ["start when packed", f"{found['seconds']:.1f} s, of the processor {found['processor']:.1f} s"]
    yield ["own memory of a training process", f"{found['after']:.0f} MB, {found['before']:.0f} without the data"]
    yield [f"own memory of a loader process, after {LOOKUPS:,} look-ups", f"{found['worker']:.0f} MB"]
    yield ["of which it took since its first thousand", f"{found['grown']:.1f} MB"]
    yield ["look-up of an entry, processor time", f"{found['lookup']:.1f} us"]


def main(options: argparse.Namespace) -> None:
    if options.entries:
        print(describe_machine() + "\n")
        print_table([f"{options.entries:,} training entries", ""], annotations(options.entries))
        return
    count, batch, rounds = (64, 8, 10) if options.quick else (768, 32, 100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, count)
        print(describe_machine() + "\n")
        clock = Clock()
        clock.in_turns(parts((folder / "0.jpg").read_bytes()), rounds)
        print_table(["part", "ms"], ([label, f"{1000 * clock.median(label):.2f}"] for label in clock.seconds))
        print()
        config = PretrainConfig(train_file=[str(folder / "train.json")], image_root=str(folder))
        samples = [TrainingData(config, seed=0)[index] for index in range(batch)]
        size = sum(tensor.nbytes for tensor in Collate(scenes_tokenizer(), config)(samples))
        print(f"A batch of {batch} AMC samples: {size / 1e6:.2f} MB from a loader process\n")
        heads = ["AMC samples a second", "ALBEF samples a second", "evaluation images a second"]
        print_table(["loader processes", *heads], rates(folder, count, batch))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--entries", type=int, default=0, metavar="N", help="measure N training entries instead")
    main(arguments.parse_args())
