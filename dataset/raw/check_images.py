"""The images of `prepare.py check`: whether they exist and decode, and whether boxes and stated sizes fit them."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.expressions import DataFile, Problems, first_of, shown
from dataset.images import as_rgb, opened
from dataset.loader.entries import TrainingEntry
from dataset.segmentation import area, to_rle
from dataset.vg import clip_box

Item = TypeVar("Item")
Sizes: TypeAlias = "dict[Path, tuple[int, int] | None]"  # image -> (height, width), where its header can be read

TOLERANCE = 1  # pixels that a box may reach out of its image: owners count corners from 0 or 1, and round
IMAGES_PER_PROCESS = 64  # fewer are not worth another process
SAME_FORMAT = {"MPO": "JPEG"}  # a JPEG that holds a second picture


class Seen(NamedTuple):
    """One image file: its size (height, width) and format, and what keeps it from being read ("" if it is missing)."""

    size: tuple[int, int] | None = None
    format: str | None = None
    problem: str | None = None


def evenly(items: Sequence[Item], count: int | None) -> set[Item]:
    """`count` of the items, at equal distances; all of them if there are no more, or if it is None."""
    if count is None or count >= len(items):
        return set(items)
    return {items[i * len(items) // count] for i in range(count)}


def inspect_images(paths: Sequence[Path], decoded: set[Path], workers: int) -> dict[Path, Seen]:
    """Read the header of every image and decode those of `decoded`, in parallel processes."""
    tasks = [(path, path in decoded) for path in paths]
    processes = min(workers, len(paths) // IMAGES_PER_PROCESS)
    with ExitStack() as stack:
        found: Iterable[Seen] = map(inspect_image, tasks)
        if processes > 1:
            found = stack.enter_context(ProcessPoolExecutor(processes)).map(inspect_image, tasks, chunksize=16)
        bar = tqdm(found, total=len(tasks), desc="images", unit="image", disable=None)
        return dict(zip(paths, bar, strict=True))


def inspect_image(task: tuple[Path, bool]) -> Seen:
    """What is seen of an image file (path, whether to decode it)."""
    path, decode = task
    seen = Seen()
    try:
        with opened(path) as image:
            seen = Seen((image.height, image.width), image.format)
            if decode:
                as_rgb(image)
    except (FileNotFoundError, NotADirectoryError):
        return Seen(problem="")
    except Exception as error:  # a broken image can raise anything, and the others must still be looked at
        return seen._replace(problem=str(error) or type(error).__name__)
    return seen


def note_images(file: DataFile, first: dict[Path, str], seen: dict[Path, Seen]) -> None:
    """Note what is wrong with the image files, each at the first entry that names it."""
    names_of, formats = cache(_names_by_stem), Image.registered_extensions()
    for path, where in first.items():
        found = seen[path]
        if found.problem == "":
            kind, detail = "the image file does not exist; check image_root", str(path)
            if others := names_of(path.parent).get(path.stem):
                kind = "the image file does not exist, but one of another extension does; correct the entry"
                detail += f"; there is {', '.join(others)}"
            file.problems.add(where, kind, detail)
        elif found.problem is not None:
            kind = "the image cannot be decoded; is the download complete?"
            file.problems.add(where, kind, f"{path}: {found.problem}")
        elif formats.get(path.suffix.lower(), found.format) != SAME_FORMAT.get(str(found.format), found.format):
            kind = "the image's content is of another format than its name says; programs here go by the content"
            file.remarks.add(where, kind, f"{path}: {found.format}")


def _names_by_stem(folder: Path) -> dict[str, list[str]]:
    """File names by what they are without extension."""
    names: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        names.setdefault(path.stem, []).append(path.name)
    return names


def note_claims(file: DataFile, sizes: Sizes) -> None:
    """Note boxes of expressions, and stated sizes, that do not fit their image."""
    for claim in file.claims:
        if claim.boxes is not None and (size := claim.size or sizes.get(claim.image)):
            corners = np.hstack([claim.boxes[:, :2], claim.boxes[:, :2] + claim.boxes[:, 2:]]).tolist()
            remedy = "no answer can be right; do the files belong together?"
            _note_boxes(file, file.problems, claim.where, corners, size, remedy)
    stated = first_of((claim.image, claim) for claim in file.claims if claim.boxes is None and claim.size)
    for image, claim in stated.items():
        actual = sizes.get(image)
        if claim.size and actual and actual != claim.size:
            kind = "the annotated size is not that of the image file"
            file.remarks.add(claim.where, kind, f"annotated {_size_text(claim.size)}, {image} has {_size_text(actual)}")


def note_training_regions(file: DataFile, entries: Iterable[TrainingEntry], sizes: Sizes) -> None:
    """Note boxes and segmentations of training entries that do not fit their image."""
    for entry in entries:
        size = sizes.get(entry.image)
        if entry.boxes and size:
            remedy = "amc.empty_box says what training does with the entry"
            _note_boxes(file, file.remarks, entry.source, entry.boxes, size, remedy)
        with file.problems.at(entry.source):
            for one in entry.segmentations:
                if size and not area(to_rle(one, *size)):
                    kind = "a segmentation covers no pixel of its image; training passes over it"
                    file.remarks.add(entry.source, kind, f"{shown(one)} in {_size_text(size)}")


def _note_boxes(
    file: DataFile,
    empty_level: Problems,
    where: str,
    boxes: Sequence[Sequence[float]],
    size: tuple[int, int],
    remedy: str,
) -> None:
    """Note boxes [x1, y1, x2, y2] that cover no pixel of the image, or reach out of it by more than `TOLERANCE`."""
    height, width = size
    empty = [clip_box(box, height, width) is None for box in boxes]
    if all(empty):
        shown = ", ".join(map(_box_text, boxes[:3]))
        kind = f"no box covers a pixel of the image: {remedy}"
        empty_level.add(where, kind, f"{shown} in {_size_text(size)}")
        return
    for box, is_empty in zip(boxes, empty, strict=True):
        x1, y1, x2, y2 = box
        if is_empty or min(x1, y1) < -TOLERANCE or x2 > width + TOLERANCE or y2 > height + TOLERANCE:
            kind = "a box reaches out of its image, or covers no pixel of it"
            file.remarks.add(where, kind, f"{_box_text(box)} in {_size_text(size)}")


def _box_text(box: Sequence[float]) -> str:
    return f"[{', '.join(f'{x:g}' for x in box)}]"


def _size_text(size: tuple[int, int]) -> str:
    """(height, width) as people write it."""
    return f"{size[1]}x{size[0]}"
