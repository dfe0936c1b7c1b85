"""Energy, hot pixels and boxes from a map, on maps small enough to count."""

import numpy as np
import pytest
import torch

from grounding import maps, metrics


def cam_of(*rows: str) -> np.ndarray:
    """A map from digits, "." for 0."""
    return np.array([[0 if value == "." else int(value) for value in row] for row in rows], np.float32)


def test_inside_is_what_the_pointing_game_counts() -> None:
    boxes = np.array([[1.0, 0.0, 3.0, 3.0], [4.5, 2.5, 9.0, 9.0]])
    mask = maps.inside(boxes, 4, 6)
    assert mask.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1],
    ]


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


def test_energy_inside() -> None:
    cam = cam_of("1.2", "3..")
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    assert maps.energy_inside(cam, mask) == pytest.approx(4 / 6)
    assert maps.energy_inside(7 * cam, mask) == pytest.approx(4 / 6)
    cam[0, 1] = -1  # what bicubic leaves beside a peak takes nothing away, inside or outside
    assert maps.energy_inside(cam, mask) == pytest.approx(4 / 6)
    assert maps.energy_inside(np.zeros((2, 3), np.float32), mask) == 0


def test_above_chance() -> None:
    assert maps.above_chance(0.25, 0.25) == 0
    assert maps.above_chance(1, 0.25) == 1
    assert maps.above_chance(0, 0.25) == pytest.approx(-1 / 3)
    assert maps.above_chance(1, 1) == 0  # a box that is the whole image


def test_hot_pixels() -> None:
    cam = cam_of("864", "2..")
    assert maps.hot(cam, 0.5).astype(int).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert maps.hot(cam, 0.51).astype(int).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert maps.hot(cam, 1.0).astype(int).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert not maps.hot(np.zeros((2, 2)), 0.5).any()


def test_hot_inside() -> None:
    region = np.array([[1, 1, 1], [0, 1, 0]], bool)
    mask = np.array([[1, 0, 0], [1, 1, 1]], bool)
    assert maps.hot_inside(region, mask) == 2 / 4
    assert maps.hot_inside(np.zeros((2, 3), bool), mask) == 0


def test_regions() -> None:
    cam = cam_of(
        "........",
        ".99....8",
        "...9....",
        "......7.",
        ".....7..",
    )
    found = maps.regions(cam > 5)
    assert [(region.box, region.energy(cam)) for region in found] == [
        ((1, 1, 3, 2), 27),  # corners join; the order is that of the first pixel
        ((7, 1, 1, 1), 8),
        ((5, 3, 2, 2), 14),
    ]
    assert found[0].mask.astype(int).tolist() == [[1, 1, 0], [0, 0, 1]]
    assert found[0].energy(-cam) == 0  # values below 0 count as 0
    assert maps.regions(cam > 9) == []


def test_the_box_of_a_map_is_that_of_the_region_with_the_most_energy() -> None:
    cam = cam_of("9......", "..555..")
    assert maps.map_box(cam, maps.hot(cam, 0.5)) == (2, 1, 3, 1)
    assert maps.map_box(cam, maps.hot(cam, 0.9)) == (0, 0, 1, 1)
    assert maps.map_box(cam_of("4.4"), np.array([[1, 0, 1]], bool)) == (0, 0, 1, 1)  # the first of equals
    assert maps.map_box(cam, cam > 9) is None
