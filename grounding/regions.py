"""Boxes from a map alone, without a detector: a threshold, connected regions, the score of the box metric.

Boxes are [x, y, w, h] in whole pixels of the image.
"""

from typing import NamedTuple

import numpy as np

from grounding import measures
from grounding.metrics import ResizedMap, box_scores
from utils import UserError

THRESHOLD = 0.5  # docs/demo.md: of 0.2 to 0.7, the one whose best box was right most often on val of the scenes


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


def regions(shares: np.ndarray, threshold: float) -> np.ndarray:
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
    boxes = [region.box for region in measures.regions(measures.hot(shares, threshold))]
    return np.array(boxes, int).reshape(-1, 4)


def check_threshold(threshold: float) -> None:
    """Raise `UserError` when a threshold is outside of its range."""
    if not 0 < threshold <= 1:
        raise UserError(f"the threshold is a share of the map's maximum, above 0 and at most 1, not {threshold}")


def map_boxes(cam: ResizedMap, shares: np.ndarray, threshold: float) -> tuple[ScoredBox, ...]:
    """The boxes of `regions` with the score by which detections are ranked (`metrics.box_scores`), the best first."""
    boxes = regions(shares, threshold)
    if not len(boxes):
        return ()
    scores = box_scores(cam, boxes) / float(cam.pixels.max())
    order = np.argsort(-scores, kind="stable")
    return tuple(ScoredBox(tuple(boxes[k].tolist()), float(scores[k])) for k in order)
