"""Grounding metrics on one map: point, box, IoU, accuracy (SPEC section 3; AMC, arXiv 2206.15462, section 4).

Boxes are [x, y, w, h] in pixels of the original image. A map is defined up to a positive factor,
which changes no metric. `cam` is a map resized to its image, float32 (height, width).
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IOU_THRESHOLD = 0.5
ROUNDING = 1e-5  # two scores closer than this, relative to the largest, are compared by the published arithmetic
AREA_EXPONENT = 0.5  # of the box score's denominator; the constant of the published evaluation, not the config's alpha


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


def point_correct(cam: ResizedMap, boxes: np.ndarray) -> bool:
    """Pointing game: the maximum of a resized map lies strictly inside any box of (n, 4) [x, y, w, h]."""
    x, y = cam.point()
    return any(bx < x < bx + w and by < y < by + h for bx, by, w, h in boxes.tolist())


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


def best_detection(cam: ResizedMap, detections: np.ndarray) -> int | None:
    """The index of the first best-scored of (k, 4) detections; None when none scores above 0 (the release would reuse
    the previous expression's box)."""
    scores = box_scores(cam, detections)
    best = scores.max(initial=0.0)
    if best <= 0:
        return None
    close = np.flatnonzero(scores >= best * (1 - ROUNDING)).tolist()
    return (
        close[0] if len(close) == 1 else max(close, key=lambda k: _published_score(cam.pixels, *detections[k].tolist()))
    )


def _published_score(pixels: Tensor, x: float, y: float, w: float, h: float) -> float:
    """`box_scores` of one box with an area, rounded as the published evaluation rounds."""
    rows, columns = (slice(max(int(v), 0), max(int(v + length), 0)) for v, length in ((y, h), (x, w)))
    return float(pixels[rows, columns].sum() / (w * h) ** AREA_EXPONENT)


def box_correct(cam: ResizedMap, detections: np.ndarray, box: np.ndarray) -> bool:
    """The best detection for a resized map overlaps the box (4,) with IoU >= 0.5; no prediction is wrong."""
    index = best_detection(cam, detections)
    return index is not None and iou(detections[index].tolist(), box.tolist()) >= IOU_THRESHOLD


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two [x, y, w, h], with REFER's inclusive pixels: x2 = x + w - 1.

    Boxes that share a single row or column of pixels do not intersect.
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    x1, y1 = max(ax, bx), max(ay, by)
    x2, y2 = min(ax + aw - 1, bx + bw - 1), min(ay + ah - 1, by + bh - 1)
    intersection = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0.0
    return float(intersection / (aw * ah + bw * bh - intersection))


def box_chance(detections: np.ndarray, box: np.ndarray) -> float:
    """The part of (k, 4) detections that `box_correct` would count as right, in 0..1."""
    right = [iou(detection, box.tolist()) >= IOU_THRESHOLD for detection in detections.tolist()]
    return sum(right) / len(right) if right else 0.0


def accuracy(correct: Sequence[float]) -> float | None:
    """The part that is correct, in 0..1; None for a split without expressions."""
    return sum(correct) / len(correct) if len(correct) else None


def split_accuracies(correct: Sequence[float], splits: Sequence[str], names: dict[str, str]) -> dict[str, float | None]:
    """Accuracy of each split that is reported.

    Args:
        correct, splits: one value an expression, in the same order; `correct` is a bool, or a chance in 0..1.
        names: split -> the name it is reported under, in the order of the report; e.g. {"val": "val_d"}.
    """
    pairs = list(zip(correct, splits, strict=True))
    return {name: accuracy([right for right, of in pairs if of == split]) for split, name in names.items()}
