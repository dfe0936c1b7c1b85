"""One map: its resize to the image, its point, the boxes drawn from it, its share inside a box.

Boxes are [x, y, w, h] in pixels of the original image. A map is defined up to a positive factor, which changes none of
these. `cam` is a map at its image's size, float32 (height, width).
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from skimage.measure import label, regionprops
from torch import Tensor
from torch.nn import functional as F

from utils import UserError

ROUNDING = 1e-5  # two scores closer than this, relative to the largest, are compared by the published arithmetic
AREA_EXPONENT = 0.5  # of the box score's denominator; the constant of the published evaluation, not the config's alpha
THRESHOLD = 0.5  # docs/demo.md: of 0.2 to 0.7, the one whose best box was right most often on val of the scenes

Box = tuple[int, int, int, int]


class ResizedMap:
    """A map as the published evaluation resizes it to its image: float32, bicubic, align_corners False.

    The resize is linear, rows @ map @ columns^T. A sum over a box is therefore a weighted sum of the small map, and all
    pixels are two small products. These round otherwise than the library's resize; where that could decide between two
    pixels or two boxes, `pixels` decides, so that the choice is the published one.

    Args:
        pred: (h, w).
        height, width: of the image, in pixels.
    """

    def __init__(self, pred: Tensor, height: int, width: int) -> None:
        self.pred = pred.float()
        self.height, self.width = height, width

    @functools.cached_property
    def pixels(self) -> Tensor:
        """The resized map itself, float32 (height, width)."""
        size = (self.height, self.width)
        return F.interpolate(self.pred[None, None], size, mode="bicubic", align_corners=False)[0, 0]

    def product(self) -> Tensor:
        """`pixels` but for rounding, several times as fast: float32 (height, width), not kept."""
        rows, columns = (resize_weights(*sizes) for sizes in self._sizes)
        return rows @ self.pred @ columns.T

    def point(self) -> tuple[int, int]:
        """The (x, y) of the first maximum, in row-major order."""
        cam = self.product().numpy()  # whose argmax and comparison are several times as fast as the tensor's
        least = cam.max() - ROUNDING * float(self.pred.abs().max())
        unclear = np.count_nonzero(cam >= least) > 1
        y, x = divmod(int(self.pixels.argmax() if unclear else cam.argmax()), self.width)
        return x, y

    def sums(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Sums over k boxes, rows[k, 0]:rows[k, 1] and columns[k, 0]:columns[k, 1] inside the image; float64 (k,)."""
        weights = [
            summed_weights(*sizes)[ends.clip(0, sizes[1])]
            for ends, sizes in zip((rows, columns), self._sizes, strict=True)
        ]
        down, across = (ends[:, 1] - ends[:, 0] for ends in weights)
        return ((down @ self.pred.double().numpy()) * across).sum(axis=1)

    @property
    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(map's, image's) length of a column, and of a row."""
        return (self.pred.shape[0], self.height), (self.pred.shape[1], self.width)


@functools.lru_cache(maxsize=128)
def resize_weights(source: int, target: int) -> Tensor:
    """The bicubic resize of `source` values to `target` values as a matrix, float32 (target, source)."""
    return F.interpolate(torch.eye(source)[None, None], (target, source), mode="bicubic", align_corners=False)[0, 0]


@functools.lru_cache(maxsize=128)
def summed_weights(source: int, target: int) -> np.ndarray:
    """Sums of the first k rows of `resize_weights`, k = 0 to target: float64 (target + 1, source)."""
    return np.concatenate([np.zeros((1, source)), resize_weights(source, target).numpy().cumsum(0, np.float64)])


def box_scores(cam: ResizedMap, detections: np.ndarray) -> np.ndarray:
    """Score (k, 4) detections: sum of the map over rows int(y):int(y+h), columns int(x):int(x+w), divided by sqrt(w*h).

    Parts of a detection outside the image count nothing; one without an area scores 0.

    Returns:
        float64 (k,).
    """
    x, y, w, h = np.asarray(detections, np.float64).T
    sums = cam.sums(*(np.stack([start, start + length], axis=1).astype(int) for start, length in ((y, h), (x, w))))
    real = (w > 0) & (h > 0)
    return np.where(real, sums, 0) / np.where(real, w * h, 1) ** AREA_EXPONENT


class ScoredBox(NamedTuple):
    """A box [x, y, w, h], and the sum of the map in it over the square root of its area, the map's maximum being 1."""

    box: tuple[int, int, int, int]
    score: float


def share_of_maximum(cam: ResizedMap) -> np.ndarray:
    """A resized map as shares of its maximum: float32 (height, width) in [0, 1].

    What bicubic resizing takes below 0 becomes 0. The minimum is not stretched to 0, so that a flat map looks flat. A
    map without a value above 0 is 0 everywhere.

    Raises:
        UserError: it is not finite.
    """
    if not cam.pred.isfinite().all():
        raise UserError("the map holds values that are not numbers; are there such weights in the checkpoint?")
    shares = np.maximum(cam.pixels.numpy(), 0)
    peak = shares.max()
    return shares / peak if peak > 0 else shares


def map_boxes(cam: ResizedMap, shares: np.ndarray, threshold: float) -> tuple[ScoredBox, ...]:
    """The boxes of `region_boxes` with the score by which detections are ranked (`box_scores`), the best first."""
    boxes = region_boxes(shares, threshold)
    if not len(boxes):
        return ()
    scores = box_scores(cam, boxes) / float(cam.pixels.max())
    order = np.argsort(-scores, kind="stable")
    return tuple(ScoredBox(tuple(boxes[k].tolist()), float(scores[k])) for k in order)


def check_threshold(threshold: float) -> None:
    """Raise `UserError` when a threshold is outside of its range."""
    if not 0 < threshold <= 1:
        raise UserError(f"the threshold is a share of the map's maximum, above 0 and at most 1, not {threshold}")


def region_boxes(shares: np.ndarray, threshold: float) -> np.ndarray:
    """The boxes around the connected regions (neighbours by side or corner) of at least `threshold`.

    Args:
        shares: (height, width) in [0, 1], from `share_of_maximum`.
        threshold: above 0 and at most 1.

    Returns:
        int (k, 4) [x, y, w, h], from the top; none for a map that is 0 everywhere.

    Raises:
        UserError: the threshold is outside of its range.
    """
    check_threshold(threshold)
    boxes = [region.box for region in regions(hot(shares, threshold))]
    return np.array(boxes, int).reshape(-1, 4)


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


def hot(cam: np.ndarray, threshold: float) -> np.ndarray:
    """The pixels of at least `threshold` (in 0..1) times the maximum, bool (height, width); none of a flat 0 map."""
    top = cam.max()
    return (cam >= threshold * top) & (cam > 0)


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


def hot_inside(region: np.ndarray, mask: np.ndarray) -> float:
    """The part of a region's pixels that lie in a mask, in 0..1: the pointing game with a random pixel of the region.

    With a threshold of 1 the region is the maximum, and this is the pointing game itself, up to ties.
    """
    count = np.count_nonzero(region)
    return np.count_nonzero(region & mask) / count if count else 0.0
