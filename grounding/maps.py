"""All that is known of one map: its resize to the image, its point, its best box, its energy inside boxes.

Boxes are [x, y, w, h] in pixels of the original image. A map is defined up to a positive factor, which changes none of
these. `cam` is a map at its image's size, float32 (height, width).
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np
import torch
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
    """The boxes around a map's regions of at least `threshold`, the best first: see `ranked_boxes`.

    Args:
        shares: `share_of_maximum(cam)`.
        threshold: above 0 and at most 1.

    Raises:
        UserError: the threshold is outside of its range.
    """
    check_threshold(threshold)
    boxes, scores = ranked_boxes(cam, hot(shares, threshold))
    peak = float(cam.pixels.max())
    return tuple(
        ScoredBox(tuple(box), score / peak) for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)
    )


def box_around(cam: ResizedMap, pixels: np.ndarray) -> Box | None:
    """The one best box of a map: the first of `ranked_boxes`; None where no pixel is chosen."""
    boxes, _ = ranked_boxes(cam, pixels)
    return tuple(boxes[0].tolist()) if len(boxes) else None


def ranked_boxes(cam: ResizedMap, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of `regions`, ranked by the score that ranks detections (`box_scores`): the best first.

    Boxes of equal score keep the order of `regions`.

    Args:
        pixels: bool (height, width), say `hot(cam.product().numpy(), 0.5)`.

    Returns:
        int (k, 4) [x, y, w, h], and float64 (k,).
    """
    boxes = regions(pixels)
    scores = box_scores(cam, boxes)
    order = np.argsort(-scores, kind="stable")
    return boxes[order], scores[order]


def check_threshold(threshold: float) -> None:
    """Raise `UserError` when a threshold is outside of its range."""
    if not 0 < threshold <= 1:
        raise UserError(f"the threshold is a share of the map's maximum, above 0 and at most 1, not {threshold}")


def hot(cam: np.ndarray, threshold: float) -> np.ndarray:
    """The pixels of at least `threshold` (in 0..1) times the maximum, bool (height, width); none of a flat 0 map."""
    top = cam.max()
    return (cam >= threshold * top) & (cam > 0)


def regions(pixels: np.ndarray) -> np.ndarray:
    """The smallest boxes around the connected regions of chosen pixels (neighbours by side or corner).

    Args:
        pixels: bool (height, width).

    Returns:
        int (k, 4) [x, y, w, h], by the regions' first pixels in row-major order.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(pixels.astype(np.uint8), connectivity=8)
    boxes = stats[1:, :4].astype(int)  # label 0 is all other pixels
    firsts = [(y, x + int(np.argmax(labels[y, x : x + w] == k))) for k, (x, y, w, _) in enumerate(boxes.tolist(), 1)]
    return boxes[sorted(range(count - 1), key=firsts.__getitem__)]


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
