"""Grounding metrics on one map: point, box, IoU, accuracy (SPEC section 3; AMC, arXiv 2206.15462, section 4).

Boxes are [x, y, w, h] in pixels of the original image. A map is defined up to a positive factor,
which changes no metric. `cam` is a map resized to its image, float32 (height, width).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IOU_THRESHOLD = 0.5
AREA_EXPONENT = 0.5  # of the box score's denominator; the constant of the published evaluation, not the config's alpha


def resize_map(pred: Tensor, height: int, width: int) -> Tensor:
    """Resize a map (h, w) to the image's own (height, width): float32, bicubic, align_corners False."""
    return F.interpolate(pred[None, None].float(), (height, width), mode="bicubic", align_corners=False)[0, 0]


def point(cam: Tensor) -> tuple[int, int]:
    """The (x, y) of the first maximum, in row-major order, of a map (height, width)."""
    y, x = divmod(int(cam.argmax()), cam.shape[1])
    return x, y


def point_correct(cam: Tensor, boxes: np.ndarray) -> bool:
    """Pointing game: the maximum of a resized map lies strictly inside any box of (n, 4) [x, y, w, h]."""
    x, y = point(cam)
    return any(bx < x < bx + w and by < y < by + h for bx, by, w, h in boxes.tolist())


def box_scores(cam: Tensor, detections: np.ndarray) -> Tensor:
    """Score (k, 4) detections: sum of the map over rows int(y):int(y+h), columns int(x):int(x+w), divided by sqrt(w*h).

    Parts of a detection outside the image count nothing; one without an area scores 0.

    Returns:
        float32 (k,).
    """
    return torch.stack([_box_score(cam, *detection) for detection in detections.tolist()])


def _box_score(cam: Tensor, x: float, y: float, w: float, h: float) -> Tensor:
    if w <= 0 or h <= 0:
        return cam.new_zeros(())
    rows = slice(max(int(y), 0), max(int(y + h), 0))
    columns = slice(max(int(x), 0), max(int(x + w), 0))
    return cam[rows, columns].sum() / (w * h) ** AREA_EXPONENT


def best_detection(cam: Tensor, detections: np.ndarray) -> np.ndarray | None:
    """The first best-scored of (k, 4) detections, as (4,); None when none scores above 0 (the release would reuse
    the previous expression's box)."""
    if len(detections) == 0:
        return None
    score, index = box_scores(cam, detections).max(0)
    return detections[int(index)] if score > 0 else None


def box_correct(cam: Tensor, detections: np.ndarray, box: np.ndarray) -> bool:
    """The best detection for a resized map overlaps the box (4,) with IoU >= 0.5; no prediction is wrong."""
    predicted = best_detection(cam, detections)
    return predicted is not None and iou(predicted.tolist(), box.tolist()) >= IOU_THRESHOLD


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two [x, y, w, h], with REFER's inclusive pixels: x2 = x + w - 1.

    Boxes that share a single row or column of pixels do not intersect.
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    x1, y1 = max(ax, bx), max(ay, by)
    x2, y2 = min(ax + aw - 1, bx + bw - 1), min(ay + ah - 1, by + bh - 1)
    intersection = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0.0
    return float(intersection / (aw * ah + bw * bh - intersection))


def point_chance(boxes: np.ndarray, height: int, width: int) -> float:
    """The part of an image's pixels that `point_correct` would count as right, in 0..1."""
    y, x = np.mgrid[:height, :width]
    inside = np.zeros((height, width), bool)
    for bx, by, w, h in boxes.tolist():
        inside |= (bx < x) & (x < bx + w) & (by < y) & (y < by + h)
    return float(inside.mean())


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
