"""What the report computes and chooses, and its charts: pure functions."""

import time

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from grounding.maps import share_inside
from grounding.report import charts
from grounding.report.charts import chart
from grounding.report.sections import extremes, one_an_image
from grounding.report.statistics import Interval, by_category, by_length, by_size, intervals
from grounding.results import percent


def column(*values: float) -> np.ndarray:
    return np.array(values, float)[:, None]


def test_a_weight_counts_as_so_many_equal_values() -> None:
    """Whole weights are repetitions; an expression without a map has neither a value nor a weight."""
    values, images = column(0.2, 0.5, 1, np.nan), np.array([0, 0, 1, 2])
    weighted = intervals(values, images, column(3, 1, 2, np.nan))
    repeated = intervals(column(0.2, 0.2, 0.2, 0.5, 1, 1), np.array([0, 0, 0, 0, 1, 1]))
    assert np.array(weighted) == pytest.approx(np.array(repeated))
    assert weighted[0].mean == pytest.approx((3 * 0.2 + 0.5 + 2) / 6)
    assert np.isnan(intervals(values[3:], images[3:], values[3:])[0].mean)


def test_an_interval_is_what_redrawing_images_gives() -> None:
    """Two images, all right and all wrong: of four equally likely draws, one is all wrong and one all right."""
    values, images = column(1, 1, 0, 0), np.array([0, 0, 1, 1])
    (found,) = intervals(values, images)
    assert (found.low, found.high) == (0, 1)
    assert intervals(values, images, resamples=1)[0].low == intervals(values, images, resamples=1)[0].high


def test_an_interval_agrees_with_the_normal_one() -> None:
    values = (np.random.default_rng(1).random(4000) < 0.3).astype(float)
    alone = intervals(values[:, None], np.arange(4000))[0]
    error = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 4000)
    assert alone.high - alone.low == pytest.approx(2 * error, rel=0.06)
    assert alone.high + alone.low == pytest.approx(2 * values.mean(), abs=0.1 * error)


def test_expressions_of_an_image_count_as_one_draw() -> None:
    """Ten copies of each expression, of one image, tell no more than one."""
    rng = np.random.default_rng(2)
    values = (rng.random(300) < 0.5).astype(float)
    once = intervals(values[:, None], np.arange(300))[0]
    copies = intervals(np.repeat(values, 10)[:, None], np.repeat(np.arange(300), 10))[0]
    assert copies == pytest.approx(once)


def test_intervals_are_the_same_every_time_and_for_any_numbering_of_images() -> None:
    values, images = np.random.default_rng(3).random((50, 2)), np.arange(50) // 2
    first = intervals(values, images)
    assert intervals(values, images) == first
    assert intervals(values, 1000 - 3 * images)[0].mean == first[0].mean
    assert intervals(values, images, seed=1) != first


def test_what_is_not_known_does_not_count() -> None:
    nan = float("nan")
    values = np.array([[1, nan, nan], [0, 1, nan], [1, 0, nan], [nan, nan, nan]])
    a, b, c = intervals(values, np.array([0, 1, 2, 3]))
    assert a.mean == pytest.approx(2 / 3)
    assert b.mean == 0.5
    assert (b.low, b.high) == (0, 1)
    assert np.isnan(c).all()
    assert np.isnan(intervals(np.zeros((0, 1)), np.zeros(0, int))[0]).all()


def test_one_image_has_a_mean_of_its_expressions_and_no_interval() -> None:
    one, both = intervals(np.array([[1, 1], [0, 0], [1, 0], [1, 0], [np.nan, 1]]), np.array([7, 7, 7, 7, 3]))
    assert (one.mean, both.mean) == (0.75, pytest.approx(0.4))
    assert np.isnan([one.low, one.high]).all()
    assert not np.isnan([both.low, both.high]).any()


def test_paired_differences_are_surer_than_their_parts() -> None:
    rng = np.random.default_rng(4)
    one = (rng.random(400) < 0.5).astype(float)
    other = np.where(rng.random(400) < 0.1, 1, one)
    a, b, difference = intervals(np.stack([one, other, other - one], axis=1), np.arange(400))
    assert difference.mean == pytest.approx(b.mean - a.mean)
    assert difference.low > 0
    assert difference.high - difference.low < 0.6 * (b.high - b.low)


def test_two_thousand_resamples_of_many_images_are_quick() -> None:
    started = time.process_time()
    intervals(np.random.default_rng(5).random((10_000, 4)), np.arange(10_000) // 4)
    assert time.process_time() - started < 5


def test_an_interval_in_words() -> None:
    nan = float("nan")
    assert (Interval(0.8125, 0.7, 0.9).text(), Interval(0.8125, 0.7, 0.9).range) == ("81.25", "70.0 to 90.0")
    assert (Interval(0.8125, nan, nan).text(), Interval(0.8125, nan, nan).range) == ("81.25", "")
    assert (Interval(nan, nan, nan).text(), Interval(nan, nan, nan).range) == ("-", "")
    assert [Interval(mean, nan, nan).text(signed=True) for mean in (0.1, 0, -0.1)] == ["+10.00", "0.00", "-10.00"]
    assert Interval(float(np.float64(2) / 3), 0, 1).text() == percent(2 / 3)  # as in the log


# ---- groups


def shown(labels: pd.Series) -> dict[str, list[int]]:
    return {str(name): of.index.tolist() for name, of in labels.groupby(labels, observed=True)}


def test_groups_by_size() -> None:
    areas = pd.Series([0.005, 0.01, 0.3, 0.5, 0.0, 1.0, 0.0199, np.nan])
    assert shown(by_size(areas)) == {
        "under 1%": [0, 4],
        "1 to 2%": [1, 6],
        "20 to 50%": [2],
        "50% and more": [3, 5],
    }


def test_groups_by_length() -> None:
    assert shown(by_length(pd.Series([1, 2, 3, 4, 5, 6, 8, 9, 0]))) == {
        "1 word": [0, 8],
        "2 words": [1],
        "3 words": [2],
        "4 to 5 words": [3, 4],
        "6 to 8 words": [5, 6],
        "9 words and more": [7],
    }


def test_groups_by_category() -> None:
    named = [("people",), (), ("scene", "other"), ("people", "people"), ("animals",), ("animals",), ("other",)]
    categories = pd.Series(named)
    assert shown(by_category(categories)) == {
        "animals": [4, 5],
        "other": [2, 6],
        "people": [0, 3],
        "scene": [2],
    }
    assert shown(by_category(categories, most=3)) == {
        "animals": [4, 5],
        "other": [2, 6],
        "2 other categories": [0, 2, 3],
    }
    assert shown(by_category(pd.Series([(), ()]))) == {}


# ---- shares, choices, charts


def test_share_inside() -> None:
    cam = np.array([[1, 0, 2], [3, 0, 0]], np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    assert share_inside(cam, mask) == share_inside(7 * cam, mask) == pytest.approx(4 / 6)
    assert share_inside(cam > 0, mask) == pytest.approx(2 / 3)
    assert share_inside(np.zeros((2, 3), np.float32), mask) == share_inside(cam > 3, mask) == 0


def test_extremes() -> None:
    values = pd.Series([0.5, 0.9, np.nan, 0.9, 0.1, 0.2, 0.4])
    images = pd.Series(list("abcdefg"))
    assert extremes(values, images, 2) == ([1, 3], [0, 6], [4, 5])
    assert extremes(values[:2], images, 2) == ([1], [], [0])
    assert extremes(values, pd.Series(["a"] * 7), 2) == ([1], [], [])  # one of an image
    assert extremes(values[2:3], images, 2) == ([], [], [])
    assert one_an_image(pd.Series([3, 2, 2, 1]), pd.Series(list("abcc")), 3) == [3, 1, 0]
    assert one_an_image(pd.Series([3, 2, 2, 1]), pd.Series(list("abcc")), 3, taken=[2]) == [1, 0]


def test_names_that_look_like_formulas_are_drawn_as_they_are() -> None:
    interval, nothing = Interval(0.5, 0.4, 0.6), Interval(*[float("nan")] * 3)
    grid = pd.DataFrame({"$d_{$": [interval] * 2, "e": [nothing] * 2}, ["$b_{$", "c"])
    assert chart({"$a_{$": grid}).startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["AMC", "control"], 2),
        (["checkpoint_00", "output/refcoco/amc/epoch 02", "output/refcoco/amc/epoch 04"], 2),
        ([f"/home/someone/experiments/{'long' * 30} epoch {number}" for number in range(4)], 1),
    ],
)
def test_long_names_stay_within_a_chart(names: list[str], columns: int) -> None:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    lines = [axes.plot([0, 1])[0] for _ in names]
    charts._legend(figure, lines, names)
    (legend,) = figure.legends
    shown = legend.get_window_extent()
    assert shown.width <= figure.bbox.width
    figure.draw_without_rendering()
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns
    assert ["".join(text.get_text().split()) for text in legend.get_texts()] == [
        "".join(name.split()) for name in names
    ]
