"""All that is known of one map: its resize to the image, its point, its boxes.

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

    Float64 (k,). Parts of a detection outside the image count nothing; one without an area scores 0.
    """
    x, y, w, h = np.asarray(detections, np.float64).T
    sums = cam.sums(*(np.stack([start, start + length], axis=1).astype(int) for start, length in ((y, h), (x, w))))
    real = (w > 0) & (h > 0)
    return np.where(real, sums, 0) / np.where(real, w * h, 1) ** AREA_EXPONENT


class ScoredBox(NamedTuple):
    """A box [x, y, w, h] around a region of a map, and the map's score in it (`box_scores`)."""

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
    """The boxes around a map's regions of at least `threshold`, the best first; scores are of the map / its maximum.

    Args:
        shares: `share_of_maximum(cam)`.
        threshold: above 0 and at most 1.

    Raises:
        UserError: the threshold is outside of its range.
    """
    check_threshold(threshold)
    peak = float(cam.pixels.max())
    return tuple(ScoredBox(box, score / peak) for box, score in ranked_boxes(cam, hot(shares, threshold)))


def ranked_boxes(cam: ResizedMap, pixels: np.ndarray) -> list[ScoredBox]:
    """The boxes of `regions`, ranked as detections are, the best first; of equal scores the first of `regions`.

    Args:
        pixels: bool (height, width), say `hot(cam.product().numpy(), 0.5)`.
    """
    boxes = regions(pixels)
    found = zip(boxes.tolist(), box_scores(cam, boxes).tolist(), strict=True)
    return sorted((ScoredBox(tuple(box), score) for box, score in found), key=lambda box: -box.score)


def check_threshold(threshold: float) -> None:
    """Raise `UserError` when a threshold is outside of its range."""
    if not 0 < threshold <= 1:
        raise UserError(f"the threshold is a share of the map's maximum, above 0 and at most 1, not {threshold}")


def hot(cam: np.ndarray, threshold: float) -> np.ndarray:
    """The pixels of at least `threshold` (in 0..1) times the maximum, bool (height, width); none of a flat 0 map."""
    top = cam.max()
    return (cam >= threshold * top) & (cam > 0)


def regions(pixels: np.ndarray) -> np.ndarray:
    """The smallest boxes around the connected regions (by side or corner) of chosen pixels, bool (height, width).

    Int (k, 4) [x, y, w, h], by the regions' first pixels in row-major order.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(pixels.astype(np.uint8), connectivity=8)
    boxes = stats[1:, :4].astype(int)  # label 0 is all other pixels
    firsts = [(y, x + int(np.argmax(labels[y, x : x + w] == k))) for k, (x, y, w, _) in enumerate(boxes.tolist(), 1)]
    return boxes[sorted(range(count - 1), key=firsts.__getitem__)]


def inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels strictly inside any of (n, 4) boxes: those that the pointing game counts as right.

    Bool (height, width); its mean is the accuracy of a random pixel.
    """
    mask = np.zeros((height, width), bool)
    for x, y, w, h in boxes.tolist():
        rows, columns = (
            slice(max(int(np.floor(start)) + 1, 0), max(int(np.ceil(start + length)), 0))
            for start, length in ((y, h), (x, w))
        )
        mask[rows, columns] = True
    return mask


def share_inside(values: np.ndarray, mask: np.ndarray) -> float:
    """The part of the sum of values, none below 0, that lies in a mask, in 0..1; 0 where the sum is 0.

    Of a map it is its energy inside: the energy-based pointing game of Score-CAM (Wang et al., CVPR Workshops 2020). Of
    the pixels of a region it is the pointing game with a random one of them.
    """
    total = float(values.sum(dtype=np.float64))
    return float(values[mask].sum(dtype=np.float64)) / total if total > 0 else 0.0
