"""The fields of Visual Genome's annotations, which differ in name and form from version to version: 1.0, 1.2 and 1.4.

docs/data/visual_genome.md has a table of them. All functions raise `EntryProblem` at what cannot be used.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from dataset.expressions import EntryProblem
from dataset.text import clean_caption
from dataset.vg import clip_box

T = TypeVar("T")
Row = dict[str, Any]
Box = tuple[int, int, int, int]  # [x1, y1, x2, y2] in pixels, inside the image, not empty

# What versions call the same, the newest first.
IMAGE_ID, OBJECT_ID = ("image_id", "id"), ("object_id", "id")
NAMES = ("names", "object_names", "name")
MOST_PIXELS = 1 << 20  # of an image's side; numbers far above cannot be multiplied by fractions
ON_DISK = re.compile(r"(?:^|/)(VG_100K(?:_2)?/([0-9]{1,18})\.jpg)$")


class Image(NamedTuple):
    """`name` is the path under the images' folder: VG_100K/<id>.jpg or VG_100K_2/<id>.jpg."""

    name: str
    width: int
    height: int
    coco_id: int | None
    flickr_id: int | None


class Region(NamedTuple):
    """A region description; `box` is None when nothing of it is inside the image."""

    image_id: int | None
    phrase: str
    box: Box | None


class Thing(NamedTuple):
    """An object; none of its names and attributes is blank, or equal to another once cleaned."""

    object_id: int | None
    names: list[str]
    attributes: list[str]
    box: Box | None


def read_image(row: Row) -> tuple[int, Image]:
    """An entry of image_data.json."""
    image_id = read_image_id(row)
    url = row.get("url")
    match = ON_DISK.search(url) if isinstance(url, str) else None
    if match is None or int(match[2]) != image_id:
        raise EntryProblem(
            "key 'url' must end in VG_100K/<image id>.jpg or VG_100K_2/<image id>.jpg, where the image is on disk",
            f"image {image_id}, found {url!r:.100}",
        )
    width, height = row.get("width"), row.get("height")
    if type(width) is not int or type(height) is not int or min(width, height) < 1 or max(width, height) > MOST_PIXELS:
        raise EntryProblem("keys 'width' and 'height' must be positive integers", f"image {image_id}")
    return image_id, Image(match[1], width, height, as_id(row.get("coco_id")), as_id(row.get("flickr_id")))


def read_image_id(row: Row) -> int:
    """The id of the image that an entry belongs to."""
    image_id = the_same(row, IMAGE_ID, lambda key: as_id(row.get(key)))
    if image_id is None:
        raise EntryProblem("key 'image_id' or 'id' is missing")
    return image_id


def read_regions(rows: list[Any], image: Image) -> list[Region]:
    def read(row: Row) -> Region:
        phrase = row.get("phrase")
        if phrase is not None and not is_text(phrase):
            raise EntryProblem("key 'phrase' must be a text", f"found {phrase!r:.60}")
        return Region(as_id(row.get("image_id")), phrase or "", read_box(row, image))

    return list(read_each(rows, f"{image.name}, region", read))


def read_things(rows: list[Any], image: Image) -> list[Thing]:
    def read(row: Row) -> Thing:
        if row.keys().isdisjoint(NAMES):
            raise EntryProblem("key 'names' is missing")
        object_id = the_same(row, OBJECT_ID, lambda key: as_id(row.get(key)))
        names = the_same(row, NAMES, lambda key: read_texts(row, key)) or []
        return Thing(object_id, names, read_texts(row, "attributes"), read_box(row, image))

    return list(read_each(rows, f"{image.name}, object", read))


def the_same(row: Row, keys: Sequence[str], read: Callable[[str], T]) -> T | None:
    """`read` of the first of these keys, which versions call the same, that the row has; None if it has none.

    Raises:
        EntryProblem: it has several, and they differ; null is no difference.
    """
    found = {key: read(key) for key in keys if row.get(key) is not None}
    (first, value), *others = found.items() or [("", None)]
    for other, another in others:
        if another != value:
            kind = f"keys '{first}' and '{other}' mean the same but differ; leave out the wrong one"
            raise EntryProblem(kind, f"{value!r:.60} and {another!r:.60}")
    return value


def read_each(rows: Iterable[Any], what: str, read: Callable[[Row], T]) -> Iterator[T]:
    """`read` of every row, each of which must be an object; problems say at which `what` they are."""
    for index, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise EntryProblem("must be an object {key: value}", f"found a {type(row).__name__}")
            item = read(row)
        except EntryProblem as problem:
            detail = f"{what} {index}" + (f", {problem.detail}" if problem.detail else "")
            raise EntryProblem(problem.kind, detail) from None
        yield item


def read_texts(row: Row, key: str) -> list[str]:
    """The texts under a key that may be missing, null, one text or a list: not blank, and each once (when cleaned)."""
    value = row.get(key)
    texts = value if isinstance(value, list) else [value]
    unique: dict[str, str] = {}
    for text in texts:
        if text is not None and not is_text(text):
            raise EntryProblem(f"key '{key}' must be a text or a list of texts", f"found {value!r:.60}")
        unique.setdefault(clean(text or ""), one_line(text or ""))
    unique.pop("", None)
    return list(unique.values())


def read_box(row: Row, image: Image) -> Box | None:
    """The box from x, y and w, h or width, height, clipped to the image as the trainer does; None if that is empty."""
    x, y = _number(row, "x"), _number(row, "y")
    w, h = _side(row, "w", "width"), _side(row, "h", "height")
    return clip_box((x, y, x + w, y + h), image.height, image.width)


def _side(row: Row, short: str, long: str) -> float:
    value = _number(row, short if short in row else long)
    if row.get(long, value) != value:
        raise EntryProblem(f"keys '{short}' and '{long}' mean the same but differ", f"{value} and {row[long]!r:.60}")
    return value


def _number(row: Row, key: str) -> float:
    value: Any = row.get(key)
    if type(value) not in (int, float) or not abs(value) < MOST_PIXELS**2:  # not: NaN is none either
        raise EntryProblem(f"key '{key}' must be a number", f"found {value!r:.60}" if key in row else "it is missing")
    return value


def as_id(value: Any) -> int | None:
    """An id: an integer, the same as a string in some releases, or None."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    if value is None or (type(value) is int and abs(value) < 1 << 64):
        return value
    raise EntryProblem("an id must be an integer", f"found {value!r:.60}")


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be encoded: a half of a surrogate pair is no character."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def one_line(text: str) -> str:
    """Single spaces for all white space, none outside."""
    return " ".join(text.split())


@functools.lru_cache(maxsize=1 << 16)  # names and attributes recur
def clean(text: str) -> str:
    """The text as the trainer sees it, uncut: two texts are the same to us when these are equal."""
    return clean_caption(one_line(text), sys.maxsize)
