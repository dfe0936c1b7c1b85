"""Pictures of a run: small heat maps, contact sheets of several models, curves of the losses.

Texts of the data are drawn as they are: matplotlib would read "$...$" as a formula.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dataset.expressions import Expression
from dataset.reading import read_image
from grounding import maps, metrics
from grounding.pictures.render import RIGHT, WRONG, DrawnBox, draw, pixels, save, see_through
from models.amc import MAP_LOSSES

SHOWN_SIDE, PANEL_DPI = 280, 100  # of a picture of `panel`: pixels of the longer side, dots an inch
DPI = 110  # of contact sheets and curves


class Case(NamedTuple):
    """An expression and, from each model to compare, its map (h, w)."""

    expression: Expression
    maps: Sequence[Tensor]


def contact_sheet(cases: Sequence[Case], models: Sequence[str], path: Path) -> None:
    """A PNG with a row per case: the image with its true boxes, then each model's heat map and the point it chooses."""
    figure = Figure(figsize=(2.2 * (len(models) + 1), 2.2 * len(cases) + 0.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(cases), len(models) + 1, squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        text, boxes = case.expression.text, case.expression.boxes
        image = read_image(case.expression.image, text)
        size = image.height, image.width
        row[0].imshow(panel(image, size, boxes, None))
        row[0].set_title(text, fontsize=8, loc="left", wrap=True, parse_math=False)
        for axes, pred in zip(row[1:], case.maps, strict=True):
            right = metrics.point_correct(maps.ResizedMap(pred, *size), boxes)
            axes.imshow(panel(image, size, boxes, pred, right))
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name in zip(grid[0, 1:], models, strict=True):
        axes.set_title(name, fontsize=9, fontweight="bold", parse_math=False)
    save(figure, path)


def panel(
    image: Image.Image, size: tuple[int, int], boxes: np.ndarray, pred: Tensor | None, right: bool = False
) -> Image.Image:
    """An image with its true boxes and, over it, a map and the point that it chooses; `SHOWN_SIDE` long.

    Args:
        image: RGB.
        size: (height, width) that boxes and point refer to, whatever size the file has.
        boxes: (n, 4) [x, y, w, h].
        pred: the map (h, w), or None for the image alone.
        right: whether the point counts as right, for its colour.
    """
    width, height = (max(1, round(SHOWN_SIDE * length / max(size))) for length in size[::-1])
    figure = Figure(figsize=((width + 0.1) / PANEL_DPI, (height + 0.1) / PANEL_DPI), dpi=PANEL_DPI)
    axes = figure.add_axes((0, 0, width / (width + 0.1), height / (height + 0.1)))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    heat = point = None
    if pred is not None:
        cam = maps.ResizedMap(pred, height, width).product().numpy().clip(0)
        spread = float(np.ptp(cam))
        heat = (cam - cam.min()) / spread if spread > maps.ROUNDING * cam.max() else np.zeros_like(cam)
        point = maps.ResizedMap(pred, *size).point()
    truth = [DrawnBox(box, style="-") for box in boxes.tolist()]
    draw(axes, image, size, heat, see_through("turbo", 0.6, 1), truth, point, RIGHT if right else WRONG, 1.1)
    return Image.fromarray(pixels(figure))


def loss_curves(runs: dict[str, list[dict[str, Any]]], path: Path, unit: str = "steps") -> None:
    """`loss_figure` as a PNG or an SVG, by the file's name."""
    save(loss_figure(runs, unit), path)


def loss_figure(runs: dict[str, list[dict[str, Any]]], unit: str = "steps", columns: int = 5) -> Figure:
    """A panel per loss and a line per run. Losses that are always 0 have no panel.

    Args:
        runs: the rows of each run's steps.jsonl.
        unit: what a step is.
        columns: at most, of panels.
    """
    entries = [entry for rows in runs.values() for row in rows for entry in row.items()]
    shown = list(dict.fromkeys(name for name, value in entries if name.startswith("loss_") and value))
    columns = max(1, min(columns, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(3.2 * columns, 3 * lines), dpi=DPI, layout="constrained")
    for place, loss in enumerate(shown, 1):
        axes = figure.add_subplot(lines, columns, place)
        for index, (run, rows) in enumerate(runs.items()):
            values = np.array([row.get(loss, np.nan) for row in rows])
            if np.nan_to_num(values).any():
                mark = "o" if len(rows) == 1 else ""
                axes.plot(_steps(rows), values, f"C{index}{mark}-", label=run)
        axes.set_title(_title(loss), fontsize=10, parse_math=False)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    for axes in figure.axes[:1]:
        for text in axes.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    return figure


def _title(loss: str) -> str:
    """A loss's name in the log; of one on the map, also what its docstring begins with."""
    function = MAP_LOSSES.get(loss.removeprefix("loss_"))
    text = (function.__doc__ or "") if function else ""
    begins = re.split(r"[:\n]", text)[0].rstrip(".")
    return textwrap.fill(f"{loss}: {begins}" if begins else loss, width=40)


def _steps(rows: list[dict[str, Any]]) -> list[int]:
    """Steps taken at each row, counted through epochs; an epoch's last row tells its length."""
    taken, before, epoch, last = [], 0, None, 0
    for row in rows:
        if epoch is not None and row["epoch"] != epoch:
            before += last
        epoch, last = row["epoch"], row["step"] + 1
        taken.append(before + last)
    return taken
