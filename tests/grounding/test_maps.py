"""Hot pixels and boxes from a map, on maps small enough to count."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.expressions import Expression
from grounding import maps, metrics
from grounding.maps import THRESHOLD, ScoredBox, map_boxes, share_of_maximum
from utils import UserError


def cam_of(*rows: str) -> np.ndarray:
    """A map from digits, "." for 0."""
    return np.array([[0 if value == "." else int(value) for value in row] for row in rows], np.float32)


@pytest.mark.parametrize(
    "box", [[0, 0, 1, 1], [-5, -5, 3, 3], [-5, -5, 7, 7], [2.2, 1.1, 0.7, 0.8], [1.5, 1.5, 2, 2], [0, 0, 60, 60]]
)
def test_inside_agrees_with_the_pointing_game(box: list[float]) -> None:
    boxes = np.array([box], float)
    mask = maps.inside(boxes, 5, 7)
    for y in range(5):
        for x in range(7):
            cam = torch.zeros(5, 7)
            cam[y, x] = 1
            assert mask[y, x] == metrics.point_correct(maps.ResizedMap(cam, 5, 7), boxes)


def test_hot_pixels() -> None:
    cam = cam_of("864", "2..")
    assert maps.hot(cam, 0.5).astype(int).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert maps.hot(cam, 0.51).astype(int).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert maps.hot(cam, 1.0).astype(int).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert not maps.hot(np.zeros((2, 2)), 0.5).any()


# ---- regions and boxes


def regions_by_hand(pixels: np.ndarray) -> list[list[int]]:
    """Boxes of connected regions by filling from each first pixel in row-major order."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(pixels)}, []
    for first in sorted(left):
        if first in left:
            region, edge = {first}, [first]
            while edge:
                y, x = edge.pop()
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left - region
                region |= near
                edge += near
            left -= region
            ys, xs = ([point[axis] for point in region] for axis in (0, 1))
            found.append([min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1])
    return found


@pytest.mark.parametrize("density", [0.1, 0.25, 0.4, 0.6])
def test_regions_are_those_found_by_hand(density: float) -> None:
    rng = np.random.default_rng(int(100 * density))
    for _ in range(40):
        pixels = rng.random(rng.integers(1, 30, 2)) < density
        assert maps.regions(pixels).tolist() == regions_by_hand(pixels)


def unresized(values: list[list[float]] | np.ndarray) -> maps.ResizedMap:
    """A map of its image's own size, whose pixels are its values."""
    return maps.ResizedMap(torch.tensor(values), len(values), len(values[0]))


BLOBS = [
    [0.0, 0.0, 0.0, 0.0, 0.0, 4.0],
    [2.0, 2.0, 2.0, 0.0, 0.0, 0.0],
    [2.0, 2.0, 1.9, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 2.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 2.0],
]


def test_boxes_are_the_regions_around_the_threshold_by_score() -> None:
    cam = unresized(BLOBS)
    shares = share_of_maximum(cam)
    found = map_boxes(cam, shares, 0.5)  # 1.9: below
    assert [list(box.box) for box in found] == [[0, 1, 3, 2], [5, 0, 1, 1], [3, 3, 1, 1], [5, 4, 1, 1]]
    # the sum of the map in the box, the maximum being 1, over the root of the box's area
    assert [box.score for box in found] == pytest.approx([11.9 / 4 / 6**0.5, 1.0, 0.5, 0.5])
    found = map_boxes(cam, shares, 0.475)  # the pixel of 1.9 is in, and that of 2.0 touches it by a corner
    assert [list(box.box) for box in found] == [[0, 1, 4, 3], [5, 0, 1, 1], [5, 4, 1, 1]]
    assert found[0].score == pytest.approx(13.9 / 4 / 12**0.5)
    assert map_boxes(cam, shares, 1.0) == (ScoredBox((5, 0, 1, 1), 1.0),)


def test_the_best_box_of_a_map_is_the_same_for_the_metric_the_report_and_the_demo() -> None:
    """By score, not by energy: the 9s have less of the map than the 5s, and a higher sum per root of their area."""
    values = cam_of("99.....", "99.5555", "...5555")
    cam = unresized(values)
    assert maps.ranked_boxes(cam, maps.hot(values, 0.5))[0].box == (0, 0, 2, 2)
    assert map_boxes(cam, share_of_maximum(cam), 0.5)[0].box == (0, 0, 2, 2)
    for box, right in ([0, 0, 2, 2], 1), ([3, 1, 4, 2], 0), ([0, 0, 2, 4], 1), ([0, 0, 2, 5], 0):
        expression = Expression(Path("x"), "x", 0, "val", np.array([[9.0, 9, 9, 9], box]), annotated_size=(3, 7))
        assert metrics.score([cam.pred], [expression], ["map_box"])["map_box"] == [right], box
    values = cam_of("77.....", "77.5555", "...5555")  # 28 / 2 is less than 40 / sqrt(8)
    assert maps.ranked_boxes(unresized(values), maps.hot(values, 0.5))[0].box == (3, 1, 4, 2)
    equal = cam_of("4.4")
    assert maps.ranked_boxes(unresized(equal), maps.hot(equal, 0.5))[0].box == (0, 0, 1, 1)  # the first of equals
    assert maps.ranked_boxes(cam, values > 9) == []


def test_shares_are_of_the_maximum() -> None:
    assert share_of_maximum(unresized([[4.0, 1.0], [-1.0, 2.0]])).tolist() == [[1, 0.25], [0, 0.5]]
    assert share_of_maximum(unresized([[3.0, 3.0]])).tolist() == [[1, 1]]  # flat, not stretched
    empty = unresized([[0.0, 0.0], [0.0, 0.0]])
    assert share_of_maximum(empty).tolist() == [[0, 0], [0, 0]]
    assert map_boxes(empty, share_of_maximum(empty), THRESHOLD) == ()
    with pytest.raises(UserError, match="not numbers"):
        share_of_maximum(unresized([[float("nan"), 1.0]]))


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_thresholds_out_of_range(threshold: float) -> None:
    cam = unresized([[1.0, 1.0]])
    with pytest.raises(UserError, match="above 0 and at most 1"):
        map_boxes(cam, share_of_maximum(cam), threshold)
