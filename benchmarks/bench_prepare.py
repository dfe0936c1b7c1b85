"""`prepare.py vg` on a synthetic Visual Genome: minutes, and the most memory that it needs.

    python benchmarks/bench_prepare.py                              100,000 images, 5 million regions, 3 million objects
    python benchmarks/bench_prepare.py --images 1000 --out FOLDER   fewer, and elsewhere

The files (1.4 GB at full size) are written entry by entry to a temporary folder, in the owners' layouts and shuffled
orders of images, and deleted at the end with what was made of them. Boxes and words are random: most phrases are unlike
any other, while names and attributes are few, so that an image's objects share them.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import describe_machine

ROOT = Path(__file__).parents[1]
SIZES = ((800, 600), (500, 375), (1024, 768), (375, 500))
NAMES = ("man", "woman", "dog", "car", "tree", "building", "window", "shirt", "sign", "table", "chair", "bird", "train")
ATTRIBUTES = (
    *("red", "white", "black", "large", "small", "wooden"),
    *("green", "parked", "old", "tall", "standing", "round"),
)
FORMS = (
    "the {a} {n} by thing{m}",
    "A {n}, next to a thing{m}.",
    "{n} on thing{m} of the {a} {n}",
    "{a} {n}",
    "the {n}",
)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--regions", type=int, default=50, help="an image, on average")
    parser.add_argument("--objects", type=int, default=30, help="an image, on average")
    parser.add_argument("--out", type=Path, help="folder for the temporary folder (default: the system's)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.out and args.out.resolve()))
    try:
        write_raw(folder / "raw", args.images, args.regions, args.objects)
        measure(folder)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path) -> None:
    """Run the program in a process of its own, whose peak of memory the system keeps."""
    print(describe_machine(), flush=True)
    show_sizes(folder / "raw")
    started, load = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "prepare.py", "vg", str(folder / "raw"), "--out", str(folder / "out")]
    subprocess.run(command, check=True, cwd=ROOT)
    seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    show_sizes(folder / "out")
    busy = usage.ru_utime + usage.ru_stime - load.ru_utime - load.ru_stime
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(f"{seconds / 60:.1f} minutes ({busy / 60:.1f} of one core), {peak:.2f} GB of memory at most")


def show_sizes(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        print(f"{path.relative_to(folder.parent)}: {path.stat().st_size / 1e6:,.0f} MB", flush=True)


def write_raw(folder: Path, images: int, regions: int, objects: int) -> None:
    """image_data.json, region_descriptions.json, attributes.json and objects.json; each in another order of images."""
    folder.mkdir()
    makers: dict[str, Callable[[int, Generator], Row]] = {
        "image_data": image_row,
        "region_descriptions": lambda i, rng: {"id": i, "regions": region_rows(i, regions, rng)},
        "attributes": lambda i, rng: {"image_id": i, "attributes": object_rows(i, objects, rng, attributes=True)},
        "objects": lambda i, rng: {"image_id": i, "objects": object_rows(i, objects, rng, attributes=False)},
    }
    for index, (name, make) in enumerate(makers.items()):
        order = np.random.default_rng(index).permutation(images)
        # An image's objects are drawn from its own seed, so that attributes.json and objects.json agree.
        write_list(folder / f"{name}.json", (make(int(i) + 1, np.random.default_rng([1, i])) for i in order))


def write_list(path: Path, rows: Iterator[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            file.write(("," if index else "[") + json.dumps(row))
        file.write("]")


def image_row(image_id: int, rng: Generator) -> Row:
    width, height = SIZES[image_id % len(SIZES)]
    url = f"https://cs.stanford.edu/people/rak248/VG_100K{'_2' if image_id % 2 else ''}/{image_id}.jpg"
    coco_id = int(rng.integers(600_000)) if rng.random() < 0.5 else None
    ids = {"coco_id": coco_id, "flickr_id": int(rng.integers(10**10))}
    return {"image_id": image_id, "width": width, "height": height, "url": url, **ids}


def region_rows(image_id: int, mean: int, rng: Generator) -> list[Row]:
    rows = []
    count = int(rng.poisson(mean))
    boxes = draw_boxes(image_id, count, rng)
    words = rng.integers(10_000, size=(count, 4)).tolist()
    for k, (x, y, w, h) in enumerate(boxes):
        form, a, n, m = words[k]
        phrase = FORMS[form % len(FORMS)].format(a=pick(ATTRIBUTES, a), n=pick(NAMES, n), m=m)
        where = {"width": w, "height": h, "image_id": image_id, "phrase": phrase, "y": y, "x": x}
        rows.append({"region_id": 1000 * image_id + k, **where})
    return rows


def object_rows(image_id: int, mean: int, rng: Generator, *, attributes: bool) -> list[Row]:
    rows = []
    count = int(rng.poisson(mean))
    boxes = draw_boxes(image_id, count, rng)
    words = rng.integers(10_000, size=(count, 4)).tolist()
    for k, (x, y, w, h) in enumerate(boxes):
        name, first, second, kind = words[k]
        row: Row = {"synsets": [f"{pick(NAMES, name)}.n.01"], "h": h, "object_id": 1000 * image_id + k}
        row |= {"names": [pick(NAMES, name)], "w": w, "y": y, "x": x}
        if attributes and kind % 5:  # one in five has no key attributes
            row["attributes"] = [pick(ATTRIBUTES, first), pick(ATTRIBUTES, second)][: 1 + kind % 2]
        rows.append(row)
    return rows


def draw_boxes(image_id: int, count: int, rng: Generator) -> list[list[int]]:
    """[x, y, w, h], some of which stick out of the image."""
    width, height = SIZES[image_id % len(SIZES)]
    corners = rng.uniform(-5, 0.9 * min(width, height), size=(count, 2))
    sides = rng.exponential(0.2 * min(width, height), size=(count, 2))
    return np.concatenate([corners, sides], axis=1).astype(int).tolist()


def pick(words: Sequence[str], number: int) -> str:
    return words[number % len(words)]


if __name__ == "__main__":
    main()
