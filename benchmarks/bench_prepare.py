"""`prepare.py vg` on a synthetic Visual Genome: minutes, and the most memory that it needs.

    python benchmarks/bench_prepare.py                              100,000 images, 5 million regions, 3 million objects
    python benchmarks/bench_prepare.py --images 1000 --out FOLDER   fewer, and elsewhere

The files (1.4 GB at full size) are written entry by entry to a temporary folder, in the owners' layouts and shuffled
orders of images, and deleted at the end with what was made of them. Boxes and words are random: most phrases are unlike
any other, while names and attributes are few, so that an image's objects share them.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import describe_machine, parser

ROOT = Path(__file__).parents[1]
REGIONS, OBJECTS = 50, 30  # per image, on average
IMAGE_SIZES = ((800, 600), (500, 375), (1024, 768), (375, 500))
THINGS = ("man", "woman", "dog", "car", "tree", "building", "window", "shirt", "sign", "table", "chair", "bird")
ADJECTIVES = ("red", "white", "black", "large", "small", "wooden", "green", "parked", "old", "tall")
FORMS = (
    "the {a} {n} by thing{m}",
    "A {n}, next to a thing{m}.",
    "{n} on thing{m} of the {a} {n}",
    "{a} {n}",
    "the {n}",
)


def main(images: int, out: Path | None) -> None:
    """Run the program in a process of its own, whose peak of memory the system keeps."""
    with tempfile.TemporaryDirectory(dir=out and out.resolve()) as name:
        raw, made = Path(name, "raw"), Path(name, "out")
        write_raw(raw, images)
        print(describe_machine(), flush=True)
        show_sizes(raw)
        started, load = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "prepare.py", "vg", str(raw), "--out", str(made)], check=True, cwd=ROOT)
        seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        show_sizes(made)
    busy = usage.ru_utime + usage.ru_stime - load.ru_utime - load.ru_stime
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(f"{seconds / 60:.1f} minutes ({busy / 60:.1f} of one core), {peak:.2f} GB of memory at most")


def show_sizes(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        print(f"{path.relative_to(folder.parent)}: {path.stat().st_size / 1e6:,.0f} MB", flush=True)


def write_raw(folder: Path, images: int) -> None:
    """Write image_data.json, region_descriptions.json, attributes.json and objects.json, each in its own order."""
    folder.mkdir()
    for index, (name, make) in enumerate(MAKERS.items()):
        with open(folder / f"{name}.json", "w", encoding="utf-8") as file:
            for place, i in enumerate(np.random.default_rng(index).permutation(images)):
                # An image's objects are drawn from its own seed, so that attributes.json and objects.json agree.
                row = make(int(i) + 1, np.random.default_rng([1, i]))
                file.write(("," if place else "[") + json.dumps(row))
            file.write("]")


def image_row(image_id: int, rng: Generator) -> dict[str, Any]:
    width, height = IMAGE_SIZES[image_id % len(IMAGE_SIZES)]
    url = f"https://cs.stanford.edu/people/rak248/VG_100K{'_2' if image_id % 2 else ''}/{image_id}.jpg"
    coco_id = int(rng.integers(600_000)) if rng.random() < 0.5 else None
    ids = {"coco_id": coco_id, "flickr_id": int(rng.integers(10**10))}
    return {"image_id": image_id, "width": width, "height": height, "url": url, **ids}


def boxed_rows(image_id: int, mean: int, rng: Generator) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """An id and a box, and four random numbers, for each of about `mean` things; some boxes stick out of the image."""
    side, count = min(IMAGE_SIZES[image_id % len(IMAGE_SIZES)]), int(rng.poisson(mean))
    corners, sides = rng.uniform(-5, 0.9 * side, size=(count, 2)), rng.exponential(0.2 * side, size=(count, 2))
    boxes = np.concatenate([corners, sides], axis=1).astype(int).tolist()
    for k, (box, numbers) in enumerate(zip(boxes, rng.integers(10_000, size=(count, 4)).tolist(), strict=True)):
        yield {"id": 1000 * image_id + k, **dict(zip("xywh", box, strict=True))}, numbers


def region_rows(image_id: int, rng: Generator) -> list[dict[str, Any]]:
    rows = []
    for row, (form, a, n, m) in boxed_rows(image_id, REGIONS, rng):
        phrase = FORMS[form % len(FORMS)].format(a=ADJECTIVES[a % len(ADJECTIVES)], n=THINGS[n % len(THINGS)], m=m)
        row |= {"region_id": row.pop("id"), "width": row.pop("w"), "height": row.pop("h")}
        rows.append(row | {"image_id": image_id, "phrase": phrase})
    return rows


def object_rows(image_id: int, rng: Generator, *, attributes: bool = True) -> list[dict[str, Any]]:
    rows = []
    for row, (name, first, second, kind) in boxed_rows(image_id, OBJECTS, rng):
        noun = THINGS[name % len(THINGS)]
        row |= {"object_id": row.pop("id"), "names": [noun], "synsets": [f"{noun}.n.01"]}
        if attributes and kind % 5:  # one in five has no key attributes
            row["attributes"] = [ADJECTIVES[i % len(ADJECTIVES)] for i in (first, second)][: 1 + kind % 2]
        rows.append(row)
    return rows


MAKERS = {
    "image_data": image_row,
    "region_descriptions": lambda i, rng: {"id": i, "regions": region_rows(i, rng)},
    "attributes": lambda i, rng: {"image_id": i, "attributes": object_rows(i, rng)},
    "objects": lambda i, rng: {"image_id": i, "objects": object_rows(i, rng, attributes=False)},
}

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=100_000)
    options.add_argument("--out", type=Path, help="folder for the temporary folder (default: the system's)")
    main(**vars(options.parse_args()))
