"""Regions in COCO's form, as masks: polygons, or run lengths (RLE); docs/method.md, Data formats.

A segmentation is a list of polygons [x1, y1, x2, y2, ...] in pixels, or an RLE {"size": [height, width], "counts": run
lengths by columns, background first, or COCO's text of them}, or, as in RefCLEF, a list of RLEs. Several parts are one
region. pycocotools makes masks of them: C code that reads and writes beyond its memory where the input is not as it
expects. So it gets polygons and run lengths that were checked here, and never the text.
"""

import math
import re
from typing import Any

import numpy as np
from pycocotools import mask as coco

from dataset.expressions import EntryProblem, is_number, shown

MOST_PIXELS = 1 << 28  # of an image; Pillow opens none of more than 179 million
LONGEST_OUTLINE = 1 << 20  # pixels, of all polygons of a region; pycocotools takes some 200 bytes for each of them
Segmentation = list[Any] | dict[str, Any]
RLE = dict[str, Any]  # one region of one image, as pycocotools writes it: "size" and compressed "counts"


def check_segmentation(value: Any, what: str) -> list[Any]:
    """The parts of a segmentation: polygons, or RLEs {"size", "counts": run lengths}.

    Raises:
        EntryProblem: it is something else, or too large; `what` names it.
    """
    parts = value if isinstance(value, list) else [value]
    if {*map(type, parts)} == {dict}:
        return [{"size": part.get("size"), "counts": _run_lengths(part, what)} for part in parts]
    if {*map(type, parts)} != {list}:
        raise EntryProblem(f"{what} must be a list of polygons, or an RLE {{size, counts}}", f"found {shown(value)}")
    outline = 0.0
    for part in parts:
        if len(part) % 2 or len(part) < 6 or not all(map(is_number, part)):
            kind = f"{what}: a polygon must be finite numbers [x1, y1, x2, y2, ...], of 3 points or more"
            raise EntryProblem(kind, f"found {len(part)}: {shown(part)}")
        points = np.array([0, 0, *part, *part[:2]], np.float64).reshape(-1, 2)  # from the image's corner, and closed
        outline += np.abs(np.diff(points, axis=0)).max(axis=1).sum()
    if outline > LONGEST_OUTLINE:
        kind = f"{what}: the polygons lie or reach too far outside of any image; are their numbers pixels?"
        raise EntryProblem(kind, f"found {shown(parts[0])}")
    return parts


def _run_lengths(rle: dict[str, Any], what: str) -> list[int]:
    """The run lengths of an RLE; raises `EntryProblem`.

    In COCO's text of them, characters from "0" hold 5 bits each, the lowest first, and a sixth that says whether more
    follow; the last has the sign. From the fourth on, a number is the difference from the one before the last.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise EntryProblem(f"{what}: 'size' of an RLE must be [height, width]", f"found {shown(size)}")
    if isinstance(counts, str) and re.fullmatch("([P-o]{0,5}[0-O])*", counts):
        text, counts = counts, []
        for letters in re.findall("[P-o]*[0-O]", text):
            bits = [ord(letter) - ord("0") & 31 for letter in letters]
            number = sum(five << 5 * place for place, five in enumerate(bits)) - (bits[-1] >> 4 << 5 * len(bits))
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        kind = f"{what}: 'counts' of an RLE must be run lengths, or COCO's text of them"
        raise EntryProblem(kind, f"found {shown(rle.get('counts'))}")
    if sum(counts) != math.prod(size):
        kind = f"{what}: the counts of an RLE do not add up to height x width of its size"
        raise EntryProblem(kind, f"found {shown(sum(counts))}, size {shown(size)}")
    return counts


def to_rle(segmentation: Any, height: int, width: int, what: str = "segmentation") -> RLE:
    """The region of a segmentation in an image; what lies outside of the image is cut off.

    Raises:
        EntryProblem: as `check_segmentation`; an RLE is of another size, or the image too large.
    """
    parts = check_segmentation(segmentation, what)
    if height * width > MOST_PIXELS:
        raise EntryProblem(f"{what}: the image has too many pixels for it", f"{width}x{height}")
    for size in (part["size"] for part in parts if isinstance(part, dict)):
        if size != [height, width]:
            sizes = f"RLE {size[1]}x{size[0]}, image {width}x{height}"
            raise EntryProblem(f"{what}: the size of an RLE is not that of its image", sizes)
    return coco.merge(coco.frPyObjects(parts, height, width))


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
