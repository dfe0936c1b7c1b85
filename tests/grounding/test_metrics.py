"""The metrics, against the published evaluation's numbers and against sums done by hand."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from config import GroundingConfig
from dataset.expressions import Expression
from grounding import maps, metrics
from grounding.benchmarks import FLICKR, REFCLEF, REFCOCO_PLUS
from tests.data_keys import data_keys

GOLDEN = Path(__file__).parents[1] / "golden"
REFCOCO = {"val": "val_d", "testA": "testA_d", "testB": "testB_d"}
TWO_SPLITS = {"val": "val_d", "test": "test"}


def refer_expressions(data: Path, dataset: str) -> list[Expression]:
    benchmark = REFCLEF if dataset == "refclef" else REFCOCO_PLUS
    return benchmark.load(GroundingConfig(**data_keys(dataset.rstrip("+"), data)))


def flickr_expressions(data: Path) -> list[Expression]:
    return FLICKR.load(GroundingConfig(**data_keys("flickr", data)))


def unresized(cam: torch.Tensor) -> maps.ResizedMap:
    """A map of its image's own size, whose pixels are its values."""
    return maps.ResizedMap(cam, *cam.shape)


def cam_of(pred: np.ndarray, expression: Expression) -> maps.ResizedMap:
    with Image.open(expression.image) as image:
        width, height = image.size
    assert expression.size == (height, width)
    return maps.ResizedMap(torch.from_numpy(pred), height, width)


def test_golden_cases_of_refcoco(golden_data: Path, golden_fixture: ModuleType, golden_metrics: dict[str, Any]) -> None:
    by_ref = {expression.ref_id: expression for expression in refer_expressions(golden_data, "refcoco+")}
    box, point = [], []
    for ref_id, pred in golden_fixture.metric_cases(1):
        expression = by_ref[ref_id]
        cam = cam_of(pred, expression)
        box.append(metrics.box(cam, expression))
        point.append(metrics.point_correct(cam, expression.boxes))
    assert box == golden_metrics["box_correct"]
    assert point == golden_metrics["point_correct"]


def test_golden_iou(golden_fixture: ModuleType, golden_metrics: dict[str, Any]) -> None:
    assert [metrics.iou(a, b) for a, b in golden_fixture.iou_cases(1)] == golden_metrics["iou"]


@pytest.mark.parametrize("name", ["refcoco", "refcoco_itc", "refclef", "flickr"])
def test_golden_maps_give_the_golden_report(golden_data: Path, name: str) -> None:
    if name == "flickr":
        expressions, names = flickr_expressions(golden_data), TWO_SPLITS
    elif name == "refclef":
        expressions, names = refer_expressions(golden_data, "refclef"), TWO_SPLITS
    else:
        expressions, names = refer_expressions(golden_data, "refcoco+"), REFCOCO
    golden = np.load(GOLDEN / f"eval_{name}.npz")
    assert [expression.ref_id for expression in expressions] == golden["ref_id"].tolist()
    cams = [cam_of(pred, expression) for pred, expression in zip(golden["pred"], expressions, strict=True)]
    pairs = list(zip(cams, expressions, strict=True))
    lines = [[metrics.point_correct(cam, e.boxes) for cam, e in pairs]]
    if names is REFCOCO:
        lines.insert(0, [metrics.box(cam, e) for cam, e in pairs])
    splits = [expression.split for expression in expressions]
    report = [metrics.split_accuracies(line, splits, names) for line in lines]
    expected = json.loads((GOLDEN / "eval_metrics.json").read_text())[name]
    assert report == [{key: value for key, value in line.items() if key != "epoch"} for line in expected]


def published_choice(cam: torch.Tensor, detections: np.ndarray) -> int | None:
    """The detection that the published evaluation chooses: sums of pixels, the first that is larger."""
    best, index = 0.0, None
    for k, (x, y, w, h) in enumerate(detections.tolist()):
        score = float(
            cam[max(int(y), 0) : max(int(y + h), 0), max(int(x), 0) : max(int(x + w), 0)].sum() / (w * h) ** 0.5
        )
        if score > best:
            best, index = score, k
    return index


def test_choices_are_those_of_the_resized_pixels() -> None:
    rng = np.random.default_rng(0)
    for kind in range(4):
        for _ in range(60):
            side, height, width = int(rng.integers(1, 25)), int(rng.integers(20, 200)), int(rng.integers(20, 200))
            pred = torch.from_numpy(rng.random((side, side)) ** 3)
            if kind == 1:  # ties, whole and nearly so: mirrored, rounded, constant
                pred = torch.maximum(pred, pred.flip(1))
            elif kind == 2:
                pred = pred.round(decimals=1)
            elif kind == 3:
                pred = torch.full_like(pred, 0.1)
            corner = rng.uniform(-10, 150, (12, 2))
            detections = np.concatenate([corner, rng.uniform(1, 90, (12, 2))], axis=1)
            detections = np.concatenate([detections, detections[::-1] + 1e-4 * rng.random((12, 1))])
            cam = maps.ResizedMap(pred, height, width)
            pixels = F.interpolate(pred.float()[None, None], (height, width), mode="bicubic", align_corners=False)[0, 0]
            y, x = divmod(int(pixels.argmax()), width)
            assert cam.point() == (x, y)
            assert metrics.best_detection(cam, detections) == published_choice(pixels, detections)


def test_resize_map_is_bicubic_on_pixel_centres() -> None:
    # A step edge doubled, by Keys' kernel (a = -0.75) at distances 0.25, 0.75, 1.25 and 1.75.
    edge = maps.ResizedMap(torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), 1, 12).pixels[0].tolist()
    rising = [0, 0, 0, -0.03515625, -0.10546875, 0.2265625]
    assert edge == pytest.approx(rising + [1 - value for value in reversed(rising)], abs=1e-6)


def test_resize_map_takes_half_precision_and_gives_float32() -> None:
    cam = maps.ResizedMap(torch.ones(4, 4, dtype=torch.float16), 5, 7).pixels
    assert cam.dtype == torch.float32
    assert cam.shape == (5, 7)


@pytest.mark.parametrize(
    ("box", "correct"),
    [
        ([2, 2, 2, 2], True),  # 2 < 3 < 4
        ([3, 2, 2, 2], False),  # on the left edge
        ([1, 2, 2, 2], False),  # on the right edge
        ([2, 3, 2, 2], False),  # on the upper edge
        ([2, 1, 2, 2], False),  # on the lower edge
        ([2.9, 2.9, 0.2, 0.2], True),
    ],
)
def test_point_must_lie_strictly_inside(box: list[float], correct: bool) -> None:
    cam = torch.zeros(6, 6)
    cam[3, 3] = 1.0
    assert metrics.point_correct(unresized(cam), np.array([box])) is correct
    assert metrics.point_correct(unresized(cam), np.array([[0, 0, 1, 1], box])) is correct


def test_box_scores_truncate_coordinates_and_divide_by_the_root_of_the_area() -> None:
    cam = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    # rows int(0.9):int(2.8), columns int(1.5):int(3.9): 1 + 2 + 7 + 8, over sqrt(2.4 * 1.9)
    scores = maps.box_scores(unresized(cam), np.array([[1.5, 0.9, 2.4, 1.9], [0, 0, 6, 4], [4, 3, 9, 9]]))
    assert scores.tolist() == pytest.approx([18 / 4.56**0.5, 276 / 24**0.5, 45 / 9], rel=1e-6)


def test_detections_outside_the_image_or_without_area_score_nothing_there() -> None:
    cam = torch.ones(4, 4)
    detections = np.array([[-2, -2, 4, 4], [-5, -5, 2, 2], [9, 9, 2, 2], [1, 1, 0, 2], [1, 1, 2, 0]])
    assert maps.box_scores(unresized(cam), detections).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_best_detection() -> None:
    cam = torch.zeros(10, 10)
    cam[2:4, 2:4] = 1.0
    detections = np.array([[0, 0, 10, 10], [2, 2, 2, 2], [2, 2, 2, 2.0], [5, 5, 2, 2]])
    assert metrics.best_detection(unresized(cam), detections) == 1
    assert metrics.best_detection(unresized(cam), detections[3:]) is None  # scores 0: no prediction
    assert metrics.best_detection(unresized(cam - 2), detections) is None  # scores below 0
    assert metrics.best_detection(unresized(cam), np.zeros((0, 4))) is None


def test_box_is_correct_from_half_overlap_on() -> None:
    cam = torch.zeros(20, 20)
    cam[0:10, 0:10] = 1.0
    detections = np.array([[0.0, 0.0, 10.0, 10.0]])

    def correct(cam: torch.Tensor, *boxes: list[float]) -> bool:
        expression = Expression(Path("x"), "x", 0, "val", np.array(boxes), detections=detections)
        return bool(metrics.box(unresized(cam), expression))

    assert correct(cam, [0, 0, 10, 20])  # exactly 0.5
    assert not correct(cam, [0, 0, 10, 20.1])
    assert not correct(cam, [0, 0, 10, 20.1], [0, 0, 10, 10])  # the first box is the true one
    assert not correct(torch.zeros(20, 20), [0, 0, 10, 10])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 4, 4], [0, 0, 4, 4], 1.0),
        ([0, 0, 4, 4], [2, 2, 4, 4], 4 / 28),
        ([0, 0, 4, 4], [3, 0, 4, 4], 0.0),  # one shared column of pixels: x1 < x2 fails
        ([0, 0, 4, 4], [4, 4, 4, 4], 0.0),
        ([0, 0, 10, 10], [2, 3, 4, 5], 20 / 100),
        ([0, 0, 3, 20], [0, 0, -3, 20], 0.0),  # of a broken file: the areas are 60 and -60
    ],
)
def test_iou(a: list[float], b: list[float], expected: float) -> None:
    assert metrics.iou(a, b) == expected
    assert metrics.iou(b, a) == expected


def test_accuracy_of_an_absent_split_is_none() -> None:
    assert metrics.accuracy([]) is None
    assert metrics.accuracy([True, False, False, True]) == 0.5
    report = metrics.split_accuracies([True, False, True], ["val", "val", "train"], {"val": "val_d", "test": "test"})
    assert report == {"val_d": 0.5, "test": None}
    assert metrics.accuracy([1.0, float("nan"), 0.0]) == 0.5  # what has no map does not count
    assert metrics.accuracy([float("nan")]) is None
    assert list(report) == ["val_d", "test"]
