"""The fields of Visual Genome's annotations, whose names and forms differ in versions 1.0, 1.2 and 1.4.

docs/data/visual_genome.md has a table of them. All functions raise `EntryProblem` at what cannot be used.
"""

import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from dataset.expressions import EntryProblem, is_text
from dataset.raw.vg_files import Row
from dataset.text import clean_caption
from dataset.vg import clip_box

T = TypeVar("T")
Corners = tuple[int, int, int, int]  # [x1, y1, x2, y2] in pixels, inside the image, not empty

# Keys of the same meaning, the newest version's first.
IMAGE_ID, OBJECT_ID, NAMES = ("image_id", "id"), ("object_id", "id"), ("names", "object_names", "name")
MOST_PIXELS = 1 << 20  # of an image's side; numbers far above cannot be multiplied by fractions
ON_DISK = re.compile(r"(?:^|/)(VG_100K(?:_2)?/([0-9]{1,18})\.jpg)$")


class Image(NamedTuple):
    """`name` is the path under the images' folder: VG_100K/<id>.jpg or VG_100K_2/<id>.jpg."""

    name: str
    width: int
    height: int
    coco_id: int | None
    flickr_id: int | None


class DescribedRegion(NamedTuple):
    """A region description; `box` is None when nothing of it is inside the image."""

    image_id: int | None
    phrase: str
    box: Corners | None


class VGObject(NamedTuple):
    """An object; none of its names and attributes is blank, or equal to another once cleaned."""

    object_id: int | None
    names: list[str]
    attributes: list[str]
    box: Corners | None


def read_image_id(row: Row) -> int:
    """The id of the image that an entry belongs to."""
    image_id = any_of(row, IMAGE_ID, read_id)
    if image_id is None:
        raise EntryProblem("key 'image_id' or 'id' is missing")
    return image_id


def read_image_row(image_id: int, row: Row) -> Image:
    url, width, height = row.get("url"), row.get("width"), row.get("height")
    match = ON_DISK.search(url) if isinstance(url, str) else None
    if match is None or int(match[2]) != image_id:
        raise EntryProblem(
            "key 'url' must end in VG_100K/<image id>.jpg or VG_100K_2/<image id>.jpg, where the image is on disk",
            f"image {image_id}, found {url!r:.100}",
        )
    if type(width) is not int or type(height) is not int or min(width, height) < 1 or max(width, height) > MOST_PIXELS:
        raise EntryProblem("keys 'width' and 'height' must be positive integers", f"image {image_id}")
    return Image(match[1], width, height, read_id(row, "coco_id"), read_id(row, "flickr_id"))


def read_region(image: Image, row: Row) -> DescribedRegion:
    """A region of an image, from region_descriptions.json."""
    phrase = row.get("phrase")
    if phrase is not None and not is_text(phrase):
        raise EntryProblem("key 'phrase' must be a text", f"found {phrase!r:.60}")
    return DescribedRegion(read_id(row, "image_id"), phrase or "", read_box(row, image))


def read_object(image: Image, row: Row) -> VGObject:
    """An object of an image, from attributes.json or objects.json."""
    if row.keys().isdisjoint(NAMES):
        raise EntryProblem("key 'names' is missing")
    names = any_of(row, NAMES, read_texts) or []
    return VGObject(any_of(row, OBJECT_ID, read_id), names, read_texts(row, "attributes"), read_box(row, image))


def read_each(rows: Iterable[Any], what: str, read: Callable[[Row], T]) -> Iterator[T]:
    """`read` of every row, each of which must be an object; an error says at which `what` it is."""
    for index, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise EntryProblem("must be an object {key: value}", f"found a {type(row).__name__}")
            item = read(row)
        except EntryProblem as problem:
            raise EntryProblem(problem.kind, f"{what} {index}, {problem.detail}".removesuffix(", ")) from None
        yield item


def any_of(row: Row, keys: Sequence[str], read: Callable[[Row, str], T]) -> T | None:
    """`read` of a row under keys that mean the same and must agree; None where all are null, empty or missing."""
    found = [(key, value) for key in keys if key in row and (value := read(row, key)) not in (None, [])]
    for (first, value), (other, another) in itertools.pairwise(found):
        if value != another:
            kind = f"keys '{first}' and '{other}' mean the same but differ; leave out the wrong one"
            raise EntryProblem(kind, f"{value!r:.60} and {another!r:.60}")
    return found[0][1] if found else None


def read_texts(row: Row, key: str) -> list[str]:
    """The texts under a key that may be missing, null, one text or a list: not blank, and each once (when cleaned)."""
    value = row.get(key)
    unique: dict[str, str] = {}
    for text in value if isinstance(value, list) else [value]:
        if text is not None and not is_text(text):
            raise EntryProblem(f"key '{key}' must be a text or a list of texts", f"found {value!r:.60}")
        unique.setdefault(clean(text or ""), one_line(text or ""))
    unique.pop("", None)
    return list(unique.values())


def read_box(row: Row, image: Image) -> Corners | None:
    """The box from x, y and w, h or width, height, clipped to the image as the trainer does; None if that is empty."""
    x, y = read_number(row, "x"), read_number(row, "y")
    w, h = read_side(row, "w", "width"), read_side(row, "h", "height")
    return clip_box((x, y, x + w, y + h), image.height, image.width)


def read_side(row: Row, short: str, long: str) -> float:
    """The number of pixels under one of two keys, or under both."""
    side = any_of(row, (short, long), read_number)
    return read_number(row, long) if side is None else side


def read_number(row: Row, key: str) -> float:
    value: Any = row.get(key)
    if type(value) not in (int, float) or not abs(value) < MOST_PIXELS**2:  # not: NaN is none either
        raise EntryProblem(f"key '{key}' must be a number", f"found {value!r:.60}" if key in row else "it is missing")
    return value


def read_id(row: Row, key: str) -> int | None:
    """An id: an integer, the same as a string in some releases, or None."""
    value = row.get(key)
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    if value is None or (type(value) is int and abs(value) < 1 << 64):
        return value
    raise EntryProblem("an id must be an integer", f"found {value!r:.60}")


def one_line(text: str) -> str:
    """Single spaces for all white space, none outside."""
    return " ".join(text.split())


@functools.lru_cache(maxsize=1 << 16)  # names and attributes recur
def clean(text: str) -> str:
    """The text as the trainer sees it, uncut: two texts are the same to us when these are equal."""
    return clean_caption(one_line(text), sys.maxsize)
