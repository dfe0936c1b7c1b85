"""What else a map says about a box: share of energy, hot pixels, a box drawn from the map alone. Pure functions.

`cam` is a map at its image's size, float (height, width); boxes are [x, y, w, h] in its pixels. Everything here is the
same for a map times a positive factor. Values below 0, which a bicubic resize leaves beside peaks, count as 0.
"""

from typing import NamedTuple

import numpy as np
from skimage.measure import label, regionprops

Box = tuple[int, int, int, int]


class Region(NamedTuple):
    """A connected region of a map's hot pixels.

    Args:
        box: the smallest [x, y, w, h] around its pixels.
        mask: which pixels of the box are its own, bool (h, w).
    """

    box: Box
    mask: np.ndarray

    def energy(self, cam: np.ndarray) -> float:
        """The sum of a map over it."""
        x, y, w, h = self.box
        return float(cam[y : y + h, x : x + w][self.mask].clip(0).sum(dtype=np.float64))


def inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels that the pointing game counts as right: those strictly inside any of the boxes.

    Args:
        boxes: (n, 4) [x, y, w, h].

    Returns:
        bool (height, width). Its mean is the accuracy of a random pixel.
    """
    mask = np.zeros((height, width), bool)
    for x, y, w, h in boxes.tolist():
        rows, columns = (
            slice(max(int(np.floor(start)) + 1, 0), max(int(np.ceil(start + length)), 0))
            for start, length in ((y, h), (x, w))
        )
        mask[rows, columns] = True
    return mask


def energy_inside(cam: np.ndarray, mask: np.ndarray) -> float:
    """The part of the map's sum that lies in a mask, in 0..1; 0 for a map without any.

    The energy-based pointing game of Score-CAM (Wang et al., CVPR Workshops 2020).
    """
    positive = cam.clip(0)
    total = float(positive.sum(dtype=np.float64))
    return float(positive[mask].sum(dtype=np.float64)) / total if total > 0 else 0.0


def above_chance(share: float, chance: float) -> float:
    """A share put on a scale where 1 is perfect and 0 is what chance gives; 0 where chance is already 1."""
    return (share - chance) / (1 - chance) if chance < 1 else 0.0


def hot(cam: np.ndarray, threshold: float) -> np.ndarray:
    """The pixels of at least `threshold` (in 0..1) times the maximum, bool (height, width); none of a flat 0 map."""
    top = cam.max()
    return (cam >= threshold * top) & (cam > 0)


def hot_inside(region: np.ndarray, mask: np.ndarray) -> float:
    """The part of a region's pixels that lie in a mask, in 0..1: the pointing game with a random pixel of the region.

    With a threshold of 1 the region is the maximum, and this is the pointing game itself, up to ties.
    """
    count = np.count_nonzero(region)
    return np.count_nonzero(region & mask) / count if count else 0.0


def regions(pixels: np.ndarray) -> list[Region]:
    """The connected regions of chosen pixels (neighbours by corners included), in order of their first pixel.

    Args:
        pixels: bool (height, width), say `hot(cam, 0.5)`.
    """
    if not pixels.any():
        return []
    (top, bottom), (left, right) = (_ends(pixels, axis) for axis in (1, 0))
    found = []
    for part in regionprops(label(pixels[top:bottom, left:right], connectivity=2)):
        y1, x1, y2, x2 = part.bbox
        found.append(Region((left + x1, top + y1, x2 - x1, y2 - y1), part.image))
    return found


def map_box(cam: np.ndarray, pixels: np.ndarray) -> Box | None:
    """The box of the region with the most energy, the first of equals; None where no pixel is chosen."""
    best = max(regions(pixels), key=lambda region: region.energy(cam), default=None)
    return best.box if best else None


def _ends(pixels: np.ndarray, axis: int) -> tuple[int, int]:
    """The first row (axis 1) or column (axis 0) that is not all false, and the one after the last."""
    used = np.flatnonzero(pixels.any(axis=axis))
    return int(used[0]), int(used[-1]) + 1
