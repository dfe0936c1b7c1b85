"""The images of `prepare.py check`: whether they exist and decode, and whether boxes and stated sizes fit them."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image
from tqdm import tqdm

from dataset.images import as_rgb, opened
from dataset.raw.check_report import CheckedFile
from dataset.vg import clip_box

Item = TypeVar("Item")

TOLERANCE = 1  # pixels that a box may reach out of its image: owners count corners from 0 or 1, and round
IMAGES_PER_PROCESS = 64  # fewer are not worth another process
SAME_FORMAT = {"MPO": "JPEG"}  # a JPEG that holds a second picture


class Seen(NamedTuple):
    """One image file: its size (height, width) and format, and what keeps it from being read ("" if it is missing)."""

    size: tuple[int, int] | None = None
    format: str | None = None
    problem: str | None = None


class Claim(NamedTuple):
    """What the entry at `where` in `file` says of its image: boxes [x1, y1, x2, y2], or without boxes its size."""

    file: CheckedFile
    where: str
    image: Path
    boxes: Sequence[Sequence[float]] = ()
    size: tuple[int, int] | None = None  # (height, width), of which boxes are pixels; None: that of the image file
    evaluated: bool = True  # the boxes are right answers of an expression; else those of a training entry


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


def note_images(file: CheckedFile, first: dict[Path, str], seen: dict[Path, Seen]) -> None:
    """Note what is wrong with the image files, each at the first entry that names it."""
    names_of, formats = cache(_names_by_stem), Image.registered_extensions()
    for path, where in first.items():
        found = seen[path]
        if found.problem == "":
            kind, detail = "the image file does not exist; check image_root", str(path)
            if others := names_of(path.parent).get(path.stem):
                kind = "the image file does not exist, but one of another extension does; correct the entry"
                detail += f"; there is {', '.join(others)}"
            file.errors.add(where, kind, detail)
        elif found.problem is not None:
            kind = "the image cannot be decoded; is the download complete?"
            file.errors.add(where, kind, f"{path}: {found.problem}")
        elif formats.get(path.suffix.lower(), found.format) != SAME_FORMAT.get(str(found.format), found.format):
            kind = "the image's content is of another format than its name says; programs here go by the content"
            file.warnings.add(where, kind, f"{path}: {found.format}")


def _names_by_stem(folder: Path) -> dict[str, list[str]]:
    """File names by what they are without extension."""
    names: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        names.setdefault(path.stem, []).append(path.name)
    return names


def note_claims(claims: Iterable[Claim], seen: dict[Path, Seen]) -> None:
    """Note boxes and stated sizes that do not fit their image: all boxes, then all sizes."""
    for claim in sorted(claims, key=lambda claim: not claim.boxes):
        actual = seen[claim.image].size if claim.image in seen else None
        if claim.boxes and (size := claim.size or actual):
            _note_boxes(claim, *size)
        elif not claim.boxes and claim.size and actual and actual != claim.size:
            kind = "the annotated size is not that of the image file"
            stated, found = (f"{width}x{height}" for height, width in (claim.size, actual))
            claim.file.warnings.add(claim.where, kind, f"annotated {stated}, {claim.image} has {found}")


def _note_boxes(claim: Claim, height: int, width: int) -> None:
    """Note boxes that cover no pixel of the image, or reach out of it by more than `TOLERANCE`."""
    empty = [clip_box(box, height, width) is None for box in claim.boxes]
    if all(empty):
        level, remedy = claim.file.warnings, "amc.empty_box says what training does with the entry"
        if claim.evaluated:
            level, remedy = claim.file.errors, "no answer can be right; do the files belong together?"
        shown = ", ".join(map(_box_text, claim.boxes[:3]))
        level.add(claim.where, f"no box covers a pixel of the image: {remedy}", f"{shown} in {width}x{height}")
        return
    for box, is_empty in zip(claim.boxes, empty, strict=True):
        x1, y1, x2, y2 = box
        if is_empty or min(x1, y1) < -TOLERANCE or x2 > width + TOLERANCE or y2 > height + TOLERANCE:
            kind = "a box reaches out of its image, or covers no pixel of it"
            claim.file.warnings.add(claim.where, kind, f"{_box_text(box)} in {width}x{height}")


def _box_text(box: Sequence[float]) -> str:
    return f"[{', '.join(f'{x:g}' for x in box)}]"
