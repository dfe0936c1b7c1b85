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
# Of a map's maximum. Where a metric has a value for each, `settle` takes the share that is best on the split `CHOOSES`.
SHARES = tuple(number / 20 for number in range(1, 20))
CHOOSES = "val"

Measure = Callable[[ResizedMap, Expression], float | np.ndarray]


class Metric(NamedTuple):
    """A metric.

    Args:
        measure: how right a map is, 0 to 1; most say True or False.
        needs: the attributes of `Expression` that it reads and that may be None.
        shape: of what `measure` returns. (): one number; (len(SHARES),): one for each of `SHARES`; (len(SHARES), 2):
            each with its weight in a mean over expressions.
    """

    measure: Measure
    needs: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


METRICS: dict[str, Metric] = {}


class MetricError(UserError):
    """A metric that does not exist, or that the benchmark's data cannot be measured by."""


def metric(*needs: str, shape: tuple[int, ...] = ()) -> Callable[[Measure], Measure]:
    """Add a function to `METRICS` under its own name."""

    def add(function: Measure) -> Measure:
        METRICS[function.__name__] = Metric(function, needs, shape)
        return function

    return add


def find_metric(name: str) -> Metric:
    """The metric of a name in `METRICS`, or of a form in `NUMBERED`; raises `MetricError`."""
    if name in METRICS:
        return METRICS[name]
    for form, function in NUMBERED.items():
        if match := re.fullmatch(form.replace("N", "([1-9][0-9]{0,3})"), name):
            return Metric(partial(function, number=int(match[1])))
    known = ", ".join([*METRICS, *NUMBERED])
    raise MetricError(f"there is no metric {name!r} in grounding/metrics.py; there are {known} (N: a number from 1 on)")


def check_metrics(names: Sequence[str], expressions: Sequence[Expression]) -> None:
    """Raise `MetricError` for a metric that is unknown, or that the expressions cannot be measured by."""
    for name, (_, needs, shape) in zip(names, map(find_metric, names), strict=True):
        for key in needs:
            lacking = [expression for expression in expressions if getattr(expression, key) is None]
            if lacking:
                raise MetricError(
                    f"metric {name!r} needs {key}, which {len(lacking)} of {len(expressions)} expressions do not have "
                    f"(the first: {lacking[0].text!r:.60}); leave the metric out"
                )
        if shape and all(one.split != CHOOSES for one in expressions):
            raise MetricError(
                f"the threshold of {name} is chosen on {CHOOSES}, and no expression is of that split; add its file to "
                "the config's data"
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
    """How right the map (h, w) of each expression is by each metric, for `settle`: a record array (n,).

    A record has a field a metric, float64 of its `shape`, NaN without a map. Raises `MetricError` as `find_metric`.
    """
    asked = [find_metric(name) for name in names]
    fields = [(name, np.float64, one.shape) for name, one in zip(names, asked, strict=True)]
    scores = np.full(len(expressions), np.nan, np.dtype(fields))
    for index, (pred, expression) in enumerate(zip(found, expressions, strict=True)):
        if pred is not None:
            cam = ResizedMap(pred, *expression.size)
            scores[index] = tuple(one.measure(cam, expression) for one in asked)
    return scores


def settle(scores: np.ndarray, splits: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Choose a share for each metric that has a value for each of `SHARES`: the best by its mean over `CHOOSES`.

    Args:
        scores: as `score` returns them.

    Returns:
        float64 (n,) by metric, its values, and by `weight_of` a metric, where it has any, their weights; and the chosen
        shares by metric, of equals the smallest. Without a map of that split none is chosen, and values are NaN.
    """
    found, weights, shares = {}, {}, {}
    for name in scores.dtype.names or ():
        columns = scores[name]
        if columns.ndim > 1:
            values = columns.reshape(*columns.shape[:2], -1)[:, :, 0]
            chooses = values[(np.array(splits) == CHOOSES) & ~np.isnan(values[:, 0])]
            if len(chooses):
                best = int(chooses.mean(axis=0).argmax())
                shares[name], columns = SHARES[best], columns[:, best]
            else:
                columns = np.full_like(columns[:, 0], np.nan)
        found[name], *more = np.atleast_2d(columns.T)
        for each in more:
            weights[weight_of(name)] = each
    return found | weights, shares


def weight_of(metric: str) -> str:
    """The name of a metric's weights, beside the metric in a table."""
    return f"{metric} weight"


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


@metric("region", shape=(len(SHARES),))
def mask_iou(cam: ResizedMap, expression: Expression) -> np.ndarray:
    """mIoU: the mean of the IoU of the map's pixels of at least a share of its maximum with the true region."""
    both, either = _overlaps(cam, expression)
    return both / either


@metric("region", shape=(len(SHARES), 2))
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


def accuracy(correct: Sequence[float] | np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """The mean, weighted or plain, of values (n,) in 0..1 without those that are NaN; None when there are no others."""
    values = np.asarray(correct, np.float64)
    weights = np.ones_like(values) if weights is None else weights
    known = ~np.isnan(values)
    return sum((values * weights)[known].tolist()) / sum(weights[known].tolist()) if known.any() else None


def split_accuracies(
    correct: Sequence[float] | np.ndarray,
    splits: Sequence[str],
    names: dict[str, str],
    weights: np.ndarray | None = None,
) -> dict[str, float | None]:
    """Accuracy of each split that is reported.

    Args:
        correct, splits: one value an expression, in the same order; `correct` is in 0..1, or NaN, which does not count.
        names: split -> the name it is reported under, in the order of the report; e.g. {"val": "val_d"}.
        weights: of the values in the mean, (n,); None: equal ones.
    """
    of = np.array(splits, str)
    return {name: accuracy(np.where(of == split, correct, np.nan), weights) for split, name in names.items()}
