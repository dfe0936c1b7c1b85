"""Whether images exist and decode, and whether boxes lie inside them: the second half of `prepare.py check`."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image
from tqdm import tqdm

from dataset.expressions import EntryProblem
from dataset.images import as_rgb, opened
from dataset.raw.check_report import Row
from dataset.vg import clip_box

T = TypeVar("T")

TOLERANCE = 1  # pixels that a box may reach out of its image: owners count corners from 0 or 1, and round
IMAGES_PER_PROCESS = 64  # fewer are not worth another process
SAME_FORMAT = {"MPO": "JPEG"}  # a JPEG that holds a second picture


class Seen(NamedTuple):
    """One image file: its size (height, width) and format, and what keeps it from being read ("" if it is missing)."""

    size: tuple[int, int] | None = None
    format: str | None = None
    problem: str | None = None


class Placed(NamedTuple):
    """Boxes [x1, y1, x2, y2] of one entry, to be held against their image.

    Args:
        row: where problems are noted.
        where: the entry, for messages.
        size: (height, width) that the boxes refer to; None: that of the image file.
        evaluated: of an expression, that is right inside any of the boxes; else of a training entry.
    """

    row: Row
    where: str
    image: Path
    boxes: Sequence[Sequence[float]]
    size: tuple[int, int] | None
    evaluated: bool


def evenly(items: Sequence[T], count: int | None) -> set[T]:
    """`count` of the items, at equal distances; all of them if there are no more, or if it is None."""
    if count is None or count >= len(items):
        return set(items)
    return {items[i * len(items) // count] for i in range(count)}


def inspect(paths: Sequence[Path], decoded: set[Path], workers: int) -> dict[Path, Seen]:
    """Read the header of every image and decode those of `decoded`, in parallel processes."""
    tasks = [(path, path in decoded) for path in paths]
    processes = min(workers, len(paths) // IMAGES_PER_PROCESS)
    with ExitStack() as stack:
        found: Iterable[Seen] = map(look, tasks)
        if processes > 1:
            found = stack.enter_context(ProcessPoolExecutor(processes)).map(look, tasks, chunksize=16)
        bar = tqdm(found, total=len(tasks), desc="images", unit="image", disable=None)
        return dict(zip(paths, bar, strict=True))


def look(task: tuple[Path, bool]) -> Seen:
    """Open an image file, and decode it if the task's second part says so."""
    path, decode = task
    seen = Seen()
    try:
        with opened(path) as image:
            seen = Seen((image.height, image.width), image.format)
            if decode:
                as_rgb(image)
    except (FileNotFoundError, NotADirectoryError):
        return Seen(problem="")
    except Exception as error:  # a broken image can raise anything, and the others are to be looked at all the same
        return seen._replace(problem=str(error) or type(error).__name__)
    return seen


def note_images(row: Row, first: dict[Path, str], seen: dict[Path, Seen]) -> None:
    """Note what is wrong with image files, each at the first entry that names it."""
    names: dict[Path, dict[str, list[str]]] = {}  # folder -> stem -> file names
    for path, where in first.items():
        found = seen[path]
        if found.problem == "":
            if path.parent not in names:
                names[path.parent] = _names(path.parent)
            row.errors.add(where, _missing(path, names[path.parent].get(path.stem, [])))
        elif found.problem is not None:
            kind = "the image cannot be decoded; is the download complete?"
            row.errors.add(where, EntryProblem(kind, f"{path}: {found.problem}"))
        elif _formats().get(path.suffix.lower(), found.format) != SAME_FORMAT.get(str(found.format), found.format):
            kind = "the image's content is of another format than its name says; programs here go by the content"
            row.warnings.add(where, EntryProblem(kind, f"{path}: {found.format}"))


def _missing(path: Path, others: list[str]) -> EntryProblem:
    if not others:
        return EntryProblem("the image file does not exist; check image_root", str(path))
    kind = "the image file does not exist, but one of another extension does; correct the entry"
    return EntryProblem(kind, f"{path}; there is {', '.join(others)}")


def _names(folder: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        names.setdefault(path.stem, []).append(path.name)
    return names


@cache
def _formats() -> dict[str, str]:
    """Extension -> format."""
    Image.init()
    return Image.registered_extensions()


def note_boxes(placed: Placed, height: int, width: int) -> None:
    """Note boxes that cover no pixel of the image, or reach out of it by more than `TOLERANCE`."""
    empty = [clip_box(box, height, width) is None for box in placed.boxes]
    of = f"in {width}x{height}"
    if not all(empty):
        for box, is_empty in zip(placed.boxes, empty, strict=True):
            if is_empty or _reaches_out(box, height, width):
                kind = "a box reaches out of its image, or covers no pixel of it"
                placed.row.warnings.add(placed.where, EntryProblem(kind, f"{_shown(box)} {of}"))
        return
    level, remedy = placed.row.warnings, "amc.empty_box says what training does with the entry"
    if placed.evaluated:
        level, remedy = placed.row.errors, "no answer can be right; do the files belong together?"
    kind = f"no box covers a pixel of the image: {remedy}"
    level.add(placed.where, EntryProblem(kind, f"{', '.join(map(_shown, placed.boxes[:3]))} {of}"))


def _reaches_out(box: Sequence[float], height: int, width: int) -> bool:
    x1, y1, x2, y2 = box
    return min(x1, y1) < -TOLERANCE or x2 > width + TOLERANCE or y2 > height + TOLERANCE


def _shown(box: Sequence[float]) -> str:
    return f"[{', '.join(f'{x:g}' for x in box)}]"
