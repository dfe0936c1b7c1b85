"""Regions in COCO's form, as masks: polygons, or run lengths (RLE); docs/method.md, Data formats.

A segmentation is a list of polygons [x1, y1, x2, y2, ...] in pixels, or an RLE {"size": [height, width], "counts": run
lengths by columns, background first, or COCO's text of them}, or, as in RefCLEF, a list of RLEs. Several parts are one
region. pycocotools decodes them: C code that reads and writes beyond its memory where the input is not as it expects.
Whatever a file holds is therefore checked here first.
"""

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco

from dataset.expressions import EntryProblem, is_number, shown

MOST_PIXELS = 1 << 28  # of an image; Pillow opens none of more than 179 million
LONGEST_OUTLINE = 1 << 20  # pixels, of all polygons of a region; pycocotools takes some 200 bytes for each of them
Segmentation = list[Any] | dict[str, Any]
RLE = dict[str, Any]  # one region of one image, as pycocotools writes it: "size" and compressed "counts"


def check_segmentation(value: Any, what: str) -> Segmentation:
    """A segmentation as it stands in a file, if `to_rle` can take it with an image of its size.

    Raises:
        EntryProblem: it is something else; `what` names it.
    """
    parts = value if isinstance(value, list) else [value]
    if not parts or not (all(isinstance(part, list) for part in parts) or all(isinstance(p, dict) for p in parts)):
        raise EntryProblem(f"{what} must be a list of polygons, or an RLE {{size, counts}}", f"found {shown(value)}")
    outline = 0.0
    for part in parts:
        if isinstance(part, dict):
            _check_rle(part, what)
        else:
            outline += _outline_of(part, what)
    if outline > LONGEST_OUTLINE:
        kind = f"{what}: the polygons lie or reach too far outside of any image; are their numbers pixels?"
        raise EntryProblem(kind, f"found {shown(parts[0])}")
    return value


def _outline_of(polygon: list[Any], what: str) -> float:
    """The length of a polygon's outline in pixels, counted from the image's corner; checks the polygon."""
    if not all(map(is_number, polygon)):
        raise EntryProblem(f"{what}: a polygon must be finite numbers [x1, y1, x2, y2, ...]", f"found {shown(polygon)}")
    if len(polygon) % 2 or len(polygon) < 6:
        kind = f"{what}: a polygon must have 3 points or more, two numbers each"
        raise EntryProblem(kind, f"found {len(polygon)} numbers")
    points = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(np.diff(points, axis=0, prepend=[[0, 0]], append=points[:1])).max(axis=1).sum())


def _check_rle(rle: dict[str, Any], what: str) -> None:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise EntryProblem(f"{what}: 'size' of an RLE must be [height, width]", f"found {shown(size)}")
    pixels = math.prod(size)
    if pixels > MOST_PIXELS:
        raise EntryProblem(f"{what}: an RLE is of more pixels than any image that is read", f"size {shown(size)}")
    if isinstance(counts, str):
        counts = _counts_of_text(counts)
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n <= pixels for n in counts):
        kind = f"{what}: 'counts' of an RLE must be run lengths, or COCO's text of them"
        raise EntryProblem(kind, f"found {shown(rle.get('counts'))}")
    if sum(counts) != pixels:
        kind = f"{what}: the counts of an RLE do not add up to height x width of its size"
        raise EntryProblem(kind, f"found {sum(counts)}, size {size}")
    if not any(counts[1::2]):
        raise EntryProblem(f"{what}: an RLE has no pixel in its region", f"size {size}")


def _counts_of_text(text: str) -> list[int] | None:
    """The run lengths in COCO's text; None where it is no such text.

    Characters from "0" hold 5 bits each, the lowest first, and a sixth that says whether more follow; from the fourth
    on, a number is the difference from the one before the last.
    """
    counts: list[int] = []
    number = place = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or place > 25:  # more characters than pycocotools has bits for
            return None
        number |= (bits & 31) << place
        place += 5
        if not bits & 32:
            number -= (bits & 16) << (place - 4)  # the sign
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = place = 0
    return None if place else counts


def to_rle(segmentation: Segmentation, height: int, width: int) -> RLE:
    """The region of a checked segmentation in an image; what lies outside of the image is cut off.

    Raises:
        EntryProblem: an RLE is of another size, or the image too large.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    if height * width > MOST_PIXELS:
        raise EntryProblem("the image has too many pixels for a segmentation", f"{width}x{height}")
    for part in parts:
        if isinstance(part, dict) and part["size"] != [height, width]:
            sizes = "{1}x{0}".format(*part["size"]), f"{width}x{height}"
            raise EntryProblem("the size of an RLE is not that of its image", "RLE {}, image {}".format(*sizes))
    # Without keys of their own: pycocotools tells what a part is by its length.
    parts = [{key: part[key] for key in ("size", "counts")} if isinstance(part, dict) else part for part in parts]
    texts = [part for part in parts if isinstance(part, dict) and isinstance(part["counts"], str)]
    others = [part for part in parts if not isinstance(part, dict) or not isinstance(part["counts"], str)]
    return coco.merge([*texts, *(coco.frPyObjects(others, height, width) if others else [])])


def from_mask(mask: np.ndarray) -> RLE:
    """A mask (h, w) of 0 and 1 as an RLE that JSON can hold."""
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def to_mask(rle: RLE) -> np.ndarray:
    """The pixels of a region: bool (height, width)."""
    return coco.decode(rle).astype(bool)


def area(rle: RLE) -> int:
    """The number of pixels of a region."""
    return int(coco.area(rle))
