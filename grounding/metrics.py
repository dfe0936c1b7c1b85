"""Grounding metrics on one map: point, box, box from the map, IoU, accuracy (AMC, arXiv 2206.15462, section 4).

A new metric is one function here, marked `@metric()`, and its name in a benchmark (grounding/benchmarks.py) or in the
config's key `metrics`. It is then logged, in the table of checkpoints and in the report.

Boxes are [x, y, w, h] in pixels of the original image. A map is defined up to a positive factor,
which changes no metric. `cam` is a map resized to its image, float32 (height, width).
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dataset.expressions import Expression
from dataset.reading import DataError
from dataset.segmentation import to_mask
from grounding.maps import (
    AREA_EXPONENT,
    ROUNDING,
    THRESHOLD,
    ResizedMap,
    box_scores,
    hot,
    inside,
    ranked_boxes,
    share_inside,
)
from utils import UserError

IOU_THRESHOLD = 0.5

# How right the map is, 0 to 1; most are True or False. One of `SWEPT` tells it for each of `SHARES`: float64
# (len(SHARES), 1), or (len(SHARES), 2) with its weight in a mean.
Metric = Callable[[ResizedMap, Expression], float | np.ndarray]
# Each with the attributes of `Expression` that it reads and that may be None.
METRICS: dict[str, tuple[Metric, tuple[str, ...]]] = {}
# Those of the map's pixels of at least a share of its maximum, which `settle` chooses: how many numbers at each share.
SWEPT: dict[str, int] = {}
SHARES = tuple(number / 20 for number in range(1, 20))
CHOOSES = "val"  # the split on which a share is chosen


class MetricError(UserError):
    """A metric that does not exist, or that the benchmark's data cannot be measured by."""


def metric(*needs: str, swept: int = 0) -> Callable[[Metric], Metric]:
    """Add a function to `METRICS` under its own name, with what it needs, and to `SWEPT` where `swept` is not 0."""

    def add(function: Metric) -> Metric:
        METRICS[function.__name__] = function, needs
        if swept:
            SWEPT[function.__name__] = swept
        return function

    return add


def find_metric(name: str) -> tuple[Metric, tuple[str, ...]]:
    """The metric of a name in `METRICS`, or of a form in `NUMBERED`, with what it needs; raises `MetricError`."""
    if name in METRICS:
        return METRICS[name]
    for form, function in NUMBERED.items():
        if match := re.fullmatch(form.replace("N", "([1-9][0-9]{0,3})"), name):
            return partial(function, number=int(match[1])), ()
    known = ", ".join([*METRICS, *NUMBERED])
    raise MetricError(f"there is no metric {name!r} in grounding/metrics.py; there are {known} (N: a number from 1 on)")


def check_metrics(names: Sequence[str], expressions: Sequence[Expression]) -> None:
    """Raise `MetricError` for a metric that is unknown, or that needs what some of the expressions lack."""
    for name in names:
        for key in find_metric(name)[1]:
            lacking = [expression for expression in expressions if getattr(expression, key) is None]
            if lacking:
                raise MetricError(
                    f"metric {name!r} needs {key}, which {len(lacking)} of {len(expressions)} expressions do not have "
                    f"(the first: {lacking[0].text!r:.60}); leave the metric out"
                )


def check_masks(names: Sequence[str], expressions: Sequence[Expression]) -> None:
    """Raise `MetricError` where no share can be chosen, or an image file is of another size than its region."""
    if (chosen := SWEPT.keys() & names) and all(one.split != CHOOSES for one in expressions):
        raise MetricError(
            f"the threshold of {' and '.join(sorted(chosen))} is chosen on {CHOOSES}, and no expression is of that "
            "split; add its file to the config's data"
        )
    for one in expressions:
        with contextlib.suppress(DataError):  # a missing image is reported, or left out, by whoever reads it
            if one.region is not None and one.region["size"] != [*one.size]:
                stated, actual = (f"{width}x{height}" for height, width in (one.region["size"], one.size))
                raise MetricError(
                    f"{one.image} is {actual}, and by instances.json, whose segmentations metrics ask for, {stated}; "
                    "do the files belong together?"
                )


def score(found: Iterable[Tensor | None], expressions: Sequence[Expression], names: Sequence[str]) -> np.ndarray:
    """How right the map (h, w) of each expression is by each metric, for `settle`: float64 (n, m), NaN without a map.

    A metric has one column, in 0..1; one of `SWEPT` has one or two for each of `SHARES`.

    Raises:
        MetricError: as `check_metrics`.
    """
    check_metrics(names, expressions)
    functions = [find_metric(name)[0] for name in names]
    scores = np.full((len(expressions), sum(map(_width, names))), np.nan)
    for row, pred, expression in zip(scores, found, expressions, strict=True):
        if pred is not None:
            cam = ResizedMap(pred, *expression.size)
            row[:] = np.concatenate([np.ravel(function(cam, expression)) for function in functions])
    return scores


def _width(name: str) -> int:
    return SWEPT[name] * len(SHARES) if name in SWEPT else 1


class Scores(NamedTuple):
    """A metric of many expressions: its values, in 0..1, and their weights in a mean, both (n,), NaN without a map.

    Args:
        weights: None: they are equal.
        share: of `SHARES`, the chosen one; None where there is none to choose.
    """

    values: np.ndarray
    weights: np.ndarray | None = None
    share: float | None = None


def settle(scores: np.ndarray, splits: Sequence[str], names: Sequence[str]) -> dict[str, Scores]:
    """The columns of `score` by metric. Those of `SWEPT` are at the share with the best mean value on `CHOOSES`.

    Of equal means, the smallest share. Without a map of that split there is no share, and values are NaN.
    """
    found = {}
    ends = np.cumsum([_width(name) for name in names])
    for name, columns in zip(names, np.split(scores, ends[:-1], axis=1), strict=True):
        if name not in SWEPT:
            found[name] = Scores(columns[:, 0])
            continue
        values, *weights = np.moveaxis(columns.reshape(len(columns), len(SHARES), SWEPT[name]), 2, 0)
        chooses = values[(np.array(splits) == CHOOSES) & ~np.isnan(values[:, 0])]
        best = int(chooses.mean(axis=0).argmax()) if len(chooses) else 0
        share, known = (SHARES[best], values[:, best]) if len(chooses) else (None, np.full(len(values), np.nan))
        found[name] = Scores(known, weights[0][:, best] if weights else None, share)
    return found


# ---- the metrics


@metric("detections")
def box(cam: ResizedMap, expression: Expression) -> bool:
    """The detection that the map scores best overlaps the true box; without a best one it is wrong."""
    assert expression.detections is not None  # `check_metrics`
    index = best_detection(cam, expression.detections)
    return index is not None and overlaps(expression.detections[index].tolist(), expression.boxes[:1])


@metric()
def point(cam: ResizedMap, expression: Expression) -> bool:
    """The pointing game: the map's maximum lies inside a true box."""
    return point_correct(cam, expression.boxes)


@metric()
def map_box(cam: ResizedMap, expression: Expression) -> bool:
    """The best box of the map alone, around the pixels of at least half its maximum, overlaps a true box."""
    return map_box_correct(cam, hot(cam.product().numpy(), THRESHOLD), expression.boxes)


@metric("region", swept=1)
def mask_iou(cam: ResizedMap, expression: Expression) -> np.ndarray:
    """mIoU: the mean of the IoU of the map's pixels of at least a share of its maximum with the true region."""
    both, either = _overlaps(cam, expression)
    return (both / either)[:, None]


@metric("region", swept=2)
def mask_oiou(cam: ResizedMap, expression: Expression) -> np.ndarray:
    """oIoU: the sum of the intersections over the sum of the unions, so that large regions weigh more than in mIoU."""
    both, either = _overlaps(cam, expression)
    return np.stack([both / either, either], axis=1)


@metric("region")
def mask_energy(cam: ResizedMap, expression: Expression) -> float:
    """The share of the map's sum that lies inside the true region."""
    return share_inside(cam.product().numpy().clip(0), _true_mask(expression))


@metric("region")
def mask_point(cam: ResizedMap, expression: Expression) -> bool:
    """The pointing game with the true region in place of its box: the map's maximum is a pixel of it."""
    x, y = cam.point()
    return bool(_true_mask(expression)[y, x])


def _true_mask(expression: Expression) -> np.ndarray:
    """The pixels of an expression's region, bool (height, width)."""
    assert expression.region is not None  # `check_metrics`
    return to_mask(expression.region)


@lru_cache(maxsize=1)  # for two metrics
def _overlaps(cam: ResizedMap, expression: Expression) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union in pixels, float64 (len(SHARES),), of the true region and `hot(cam, share)` each."""
    pixels, mask = cam.product().numpy(), _true_mask(expression)
    inside, top = pixels[mask], pixels.max()
    least = [share * top if top > 0 else math.inf for share in SHARES]
    both, hottest = ([np.count_nonzero(of >= value) for value in least] for of in (inside, pixels))
    return np.array(both, np.float64), np.array(hottest, np.float64) + inside.size - both


def point_within(cam: ResizedMap, expression: Expression, number: int) -> bool:
    """The pointing game with a tolerance: the maximum is at most `number` pixels from a pixel where it would be right.

    Distances are Euclidean, between the pixels' centres, inside the image. The tolerance of the field is 15 (Zhang et
    al., ECCV 2016).
    """
    (x, y), right = cam.point(), inside(expression.boxes, cam.height, cam.width)
    left, top = max(x - number, 0), max(y - number, 0)
    rows, columns = np.nonzero(right[top : y + number + 1, left : x + number + 1])
    return bool(np.any((rows + top - y) ** 2 + (columns + left - x) ** 2 <= number**2))


def recall(cam: ResizedMap, expression: Expression, number: int) -> bool:
    """Box recall at `number`: any of so many best boxes of the map overlaps a true box; at 1 it is `map_box`."""
    return map_box_correct(cam, hot(cam.product().numpy(), THRESHOLD), expression.boxes, number)


# Metrics with a number in their names: N in the name stands for it.
NUMBERED: dict[str, Callable[..., float]] = {"point_Npx": point_within, "recall_N": recall}


def map_box_correct(cam: ResizedMap, pixels: np.ndarray, boxes: np.ndarray, count: int = 1) -> bool:
    """Any of the `count` best boxes around chosen pixels of a map overlaps any of (n, 4); without a pixel none does."""
    return any(overlaps(found.box, boxes) for found in ranked_boxes(cam, pixels)[:count])


def point_correct(cam: ResizedMap, boxes: np.ndarray) -> bool:
    """Pointing game: the maximum of a resized map lies strictly inside any box of (n, 4) [x, y, w, h]."""
    x, y = cam.point()
    return any(bx < x < bx + w and by < y < by + h for bx, by, w, h in boxes.tolist())


def best_detection(cam: ResizedMap, detections: np.ndarray) -> int | None:
    """The first best-scored of (k, 4) detections; None when none scores above 0.

    The release would take the previous expression's box there.
    """
    scores = box_scores(cam, detections)
    best = scores.max(initial=0.0)
    if best <= 0:
        return None
    close = np.flatnonzero(scores >= best * (1 - ROUNDING)).tolist()
    if len(close) == 1:
        return close[0]
    return max(close, key=lambda k: _published_score(cam.pixels, *detections[k].tolist()))


def _published_score(pixels: Tensor, x: float, y: float, w: float, h: float) -> float:
    """`box_scores` of one box with an area, rounded as the published evaluation rounds."""
    rows, columns = (slice(max(int(v), 0), max(int(v + length), 0)) for v, length in ((y, h), (x, w)))
    return float(pixels[rows, columns].sum() / (w * h) ** AREA_EXPONENT)


def overlaps(box: Sequence[float], boxes: np.ndarray) -> bool:
    """Whether a box has IoU >= 0.5 with any of (n, 4)."""
    return any(iou(box, other) >= IOU_THRESHOLD for other in boxes.tolist())


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two [x, y, w, h], with REFER's inclusive pixels: x2 = x + w - 1.

    Boxes that share a single row or column of pixels do not intersect.
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    x1, y1 = max(ax, bx), max(ay, by)
    x2, y2 = min(ax + aw - 1, bx + bw - 1), min(ay + ah - 1, by + bh - 1)
    intersection = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0.0
    # Where they do not intersect, the sum may be 0: files hold boxes of negative sides.
    return float(intersection / (aw * ah + bw * bh - intersection)) if intersection else 0.0


def box_chance(detections: np.ndarray, box: np.ndarray) -> float:
    """The share of (k, 4) detections that the metric `box` would count as right, in 0..1."""
    right = [overlaps(detection, box[None]) for detection in detections.tolist()]
    return sum(right) / len(right) if right else 0.0


# ---- accuracy


def accuracy(correct: Sequence[float], weights: Sequence[float] | None = None) -> float | None:
    """The mean, weighted or plain, of values in 0..1 without those that are NaN; None when there are no others."""
    pairs = zip(correct, weights or [1] * len(correct), strict=True)
    known = [(value, weight) for value, weight in pairs if not math.isnan(value)]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None


def split_accuracies(
    correct: Sequence[float], splits: Sequence[str], names: dict[str, str], weights: np.ndarray | None = None
) -> dict[str, float | None]:
    """Accuracy of each split that is reported.

    Args:
        correct, splits: one value an expression, in the same order; `correct` is in 0..1, or NaN, which does not count.
        names: split -> the name it is reported under, in the order of the report; e.g. {"val": "val_d"}.
        weights: of the values in the mean, (n,); None: equal ones.
    """
    rows = list(zip(correct, splits, [1] * len(correct) if weights is None else weights.tolist(), strict=True))
    chosen = {name: [(right, weight) for right, of, weight in rows if of == split] for split, name in names.items()}
    return {name: accuracy([right for right, _ in of], [weight for _, weight in of]) for name, of in chosen.items()}
