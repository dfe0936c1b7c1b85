"""Grounding metrics on one map: point, box, IoU, accuracy (SPEC section 3; AMC, arXiv 2206.15462, section 4).

Boxes are [x, y, w, h] in pixels of the original image. A map is defined up to a positive factor,
which changes no metric. `cam` is a map resized to its image, float32 (height, width).
"""

import functools
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dataset.expressions import Expression
from dataset.reading import image_size
from grounding.maps import AREA_EXPONENT, ROUNDING, ResizedMap, box_scores

IOU_THRESHOLD = 0.5


def point_correct(cam: ResizedMap, boxes: np.ndarray) -> bool:
    """Pointing game: the maximum of a resized map lies strictly inside any box of (n, 4) [x, y, w, h]."""
    x, y = cam.point()
    return any(bx < x < bx + w and by < y < by + h for bx, by, w, h in boxes.tolist())


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


def score(maps: Sequence[Tensor | None], expressions: Sequence[Expression], names: Sequence[str]) -> np.ndarray:
    """Which expressions are grounded right by the benchmark's metrics: (n, metrics), 1 or 0, NaN without a map.

    Args:
        names: "point" and "box", as `Benchmark.metrics`.
    """
    found = np.full((len(expressions), len(names)), np.nan)
    for row, pred, expression in zip(found, maps, expressions, strict=True):
        if pred is not None:
            cam = ResizedMap(pred, *size_of(expression))
            row[:] = [_right(name, cam, expression) for name in names]
    return found


def _right(name: str, cam: ResizedMap, expression: Expression) -> bool:
    if name == "point":
        return point_correct(cam, expression.boxes)
    assert expression.detections is not None
    return box_correct(cam, expression.detections, expression.boxes[0])


def size_of(expression: Expression) -> tuple[int, int]:
    """(height, width) in pixels that its boxes refer to: as annotated in Flickr30k, else the image's own."""
    if "image_height" in expression.record:
        return expression.record["image_height"], expression.record["image_width"]
    return _file_size(expression.image)


_file_size = functools.lru_cache(maxsize=1 << 16)(image_size)  # expressions share images, and models share expressions
