"""Heat maps, contact sheets and curves: what a person sees of a run."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.expressions import Expression
from grounding import maps, metrics
from grounding.pictures.panels import Case, _steps, contact_sheet, loss_curves, loss_figure, panel


def test_a_panel_colours_the_hot_parts_alone() -> None:
    image, cam, none = Image.new("RGB", (280, 280), (100, 100, 100)), torch.zeros(7, 7), np.zeros((0, 4))
    cam[1:4, 1:4] = 5.0
    shown = np.asarray(panel(image, (280, 280), none, cam)).astype(float)
    heat = maps.ResizedMap(cam, 280, 280).product().clamp(min=0)
    share = float(heat[75, 99] / heat.max())
    assert 0.8 < share < 0.95
    colour = np.array(matplotlib.colormaps["turbo"](share)[:3]) * 255
    assert shown[75, 99] == pytest.approx(100 * (1 - 0.6 * share) + colour * 0.6 * share, abs=3)
    assert (shown[210:] == 100).all()
    flat = np.asarray(panel(image, (280, 280), none, torch.ones(7, 7)))
    assert (flat != 100).any(axis=2).sum() < 250  # the point, and nothing else


def test_contact_sheet(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "gray").save(tmp_path / "a.png")
    expression = Expression(tmp_path / "a.png", "$a_{$", 0, "val", np.array([[5.0, 5.0, 20.0, 10.0]]))
    green, red = [0x22, 0xC5, 0x5E], [0xEF, 0x44, 0x44]
    for x, y, colour in ((1, 1, green), (5, 3, red)):
        cam = torch.zeros(4, 6)
        cam[y, x] = 1.0
        contact_sheet([Case(expression, [cam])] * 2, ["$b_{$"], tmp_path / "sheet.png")  # names, not formulas
        sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3).tolist()
        assert [shown for shown in (green, red) if shown in sheet] == [colour]


@pytest.mark.parametrize(
    ("size", "shown"), [((40, 60), (280, 187)), ((60, 40), (187, 280)), ((1, 1), (280, 280)), ((3, 900), (280, 1))]
)
def test_panels_of_any_size(size: tuple[int, int], shown: tuple[int, int]) -> None:
    """size: (height, width) in pixels; shown: (width, height)."""
    image, beyond = Image.new("RGB", size[::-1]), np.array([[0.2, 0.2, 0.1, 0.1], [-5, -5, 3, 3.0]])
    assert panel(image, size, beyond, torch.ones(2, 3)).size == shown
    assert panel(image, size, beyond, None).size == shown


def test_a_panel_shows_where_box_and_point_are() -> None:
    """The annotated size counts, twice that of the file here."""
    image, box = Image.new("RGB", (60, 40), "gray"), np.array([[60.0, 20.0, 30.0, 40.0]])
    cam = torch.zeros(4, 6)
    cam[1, 4] = 1.0
    scale = 280 / 120
    for right, colour in ((True, (0x22, 0xC5, 0x5E)), (False, (0xEF, 0x44, 0x44))):
        shown = np.asarray(panel(image, (80, 120), box, cam, right)).astype(int)
        x, y = maps.ResizedMap(cam, 80, 120).point()
        assert abs(shown[int((y + 0.5) * scale), int((x + 0.5) * scale)] - colour).max() < 40
        assert abs(shown[int(40 * scale), int(60 * scale)] - 255).max() < 40  # the left edge
        assert abs(shown[int(40 * scale), int(90 * scale) - 1] - 255).max() < 40  # the right one
        assert abs(shown[int(60 * scale) - 1, int(75 * scale)] - 255).max() < 40  # the bottom
        assert (shown[int(40 * scale), int(30 * scale)] == 128).all()
    alone = np.asarray(panel(image, (80, 120), box, None)).astype(int)
    assert (alone[int(30 * scale), int(70 * scale)] == 128).all()


def test_loss_figures_wrap(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "step": 1, "loss_mlm": 1.0, "loss_ita": 1.0, "loss_itm": 1.0}, {"epoch": 0, "step": 2}]
    assert loss_figure({"a": rows}, columns=2).get_size_inches().tolist() == pytest.approx([6.4, 6.0])
    assert loss_figure({"a": rows}).get_size_inches().tolist() == pytest.approx([9.6, 3.0])
    loss_curves({"$a_{$": rows}, tmp_path / "a.png")  # a name, not a formula
    assert [axes.get_xlabel() for axes in loss_figure({"a": rows}, "epochs").axes] == ["epochs"] * 3


def test_loss_curves(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"epoch": 0, "step": 19, "loss_itm": 0.6, "loss_mlm": 3.0, "loss_ita": 2.0, "loss_cam1": 0.0, "loss_cam2": 0.0},
        {"epoch": 0, "step": 24, "loss_itm": 0.5, "loss_mlm": 2.5, "loss_ita": 1.5, "loss_cam1": 0.0, "loss_cam2": 0.0},
        {"epoch": 1, "step": 19, "loss_itm": 0.4, "loss_mlm": 2.0, "loss_ita": 1.0, "loss_cam1": 0.0, "loss_cam2": 0.0},
    ]
    assert _steps(rows) == [20, 25, 45]
    loss_curves({"control": rows}, tmp_path / "three.png")
    loss_curves({"control": rows, "AMC": [{**row, "loss_cam2": 0.3} for row in rows]}, tmp_path / "four.png")
    three, four = (Image.open(tmp_path / f"{name}.png").width for name in ("three", "four"))
    assert four == pytest.approx(three * 4 / 3, rel=0.02)  # a panel more: losses that are always 0 have none


def test_chance_of_a_random_pixel() -> None:
    box = np.array([[2.0, 1.0, 4.0, 3.0]])  # strictly inside: x 3..5, y 2..3
    peaks = torch.eye(100).reshape(100, 10, 10)
    assert sum(metrics.point_correct(maps.ResizedMap(cam, 10, 10), box) for cam in peaks) == 6
    assert maps.inside(box, 10, 10).mean() == pytest.approx(6 / 100)
    assert maps.inside(np.repeat(box, 2, axis=0), 10, 10).mean() == pytest.approx(6 / 100)  # a pixel counts once


def test_chance_of_a_random_detection() -> None:
    box = np.array([0.0, 0.0, 10.0, 10.0])
    detections = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 4, 4], [50, 50, 9, 9.0]])
    assert metrics.box_chance(detections, box) == 0.5
    assert metrics.box_chance(np.zeros((0, 4)), box) == 0.0
