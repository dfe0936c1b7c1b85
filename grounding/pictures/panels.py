"""Pictures of a run: heat maps over images, contact sheets of several models, curves of the losses.

Texts of the data are drawn as they are: matplotlib would read "$...$" as a formula.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from dataset.expressions import Expression
from dataset.reading import read_image
from grounding import maps, metrics
from utils import atomic_path

RIGHT, WRONG, TRUTH = "#22c55e", "#ef4444", "#ffffff"
SHOWN_SIDE = 280  # pixels: the longer side of a picture of `panel`
SAME_SVG: Any = {"svg.hashsalt": "amc"}  # else ids are drawn at random: two equal figures would differ as files


class Case(NamedTuple):
    """An expression and, from each model to compare, its map (h, w)."""

    expression: Expression
    maps: Sequence[Tensor]


def blend(image: np.ndarray, cam: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """A heat map over an image.

    Args:
        image: uint8 (height, width, 3).
        cam: float (height, width), any scale; its range is stretched to [0, 1].
        strength: opacity where the map is highest.

    Returns:
        uint8 (height, width, 3).
    """
    spread = float(cam.max() - cam.min())
    heat = (cam - cam.min()) / spread if spread > 0 else np.zeros_like(cam)
    colours = matplotlib.colormaps["turbo"](heat)[..., :3] * 255
    opacity = strength * heat[..., None]
    return (image * (1 - opacity) + colours * opacity).round().astype(np.uint8)


def contact_sheet(cases: Sequence[Case], models: Sequence[str], path: Path) -> None:
    """A PNG with a row per case: the image with its true boxes, then each model's heat map and the point it chooses."""
    figure = Figure(figsize=(2.2 * (len(models) + 1), 2.2 * len(cases) + 0.4), layout="constrained")
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
    _save(figure, path)


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
    height, width = size
    scale = SHOWN_SIDE / max(size)
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    image = image.resize((2 * shown[0], 2 * shown[1]), Image.Resampling.BICUBIC)  # shrunk at the end: smooth lines
    cam = None if pred is None else maps.ResizedMap(pred, height, width)
    if pred is not None:
        heat = maps.ResizedMap(pred, image.height, image.width).product().numpy().clip(0)
        image = Image.fromarray(blend(np.asarray(image), heat))
    draw, scale = ImageDraw.Draw(image), 2 * scale
    for x, y, w, h in (boxes * scale).tolist():
        right_edge, bottom = x + max(w - 1, 0), y + max(h - 1, 0)
        for grown, colour, line in ((2, "black", 9), (0, TRUTH, 5)):
            draw.rectangle([x - grown, y - grown, right_edge + grown, bottom + grown], outline=colour, width=line)
    if cam is not None:
        x, y = ((at + 0.5) * scale for at in cam.point())
        draw.ellipse([x - 12, y - 12, x + 12, y + 12], fill=RIGHT if right else WRONG, outline="black", width=3)
    return image.resize(shown, Image.Resampling.LANCZOS)


def loss_curves(runs: dict[str, list[dict[str, Any]]], path: Path, unit: str = "steps") -> None:
    """`loss_figure` as a PNG, or whatever the file's name ends in."""
    _save(loss_figure(runs, unit), path)


def loss_figure(runs: dict[str, list[dict[str, Any]]], unit: str = "steps", columns: int = 5) -> Figure:
    """A panel per loss, titled by its name in the log, and a line per run. Losses that are always 0 have no panel.

    Args:
        runs: the rows of each run's steps.jsonl.
        unit: what a step is.
        columns: how many panels stand side by side, at most.
    """
    entries = [entry for rows in runs.values() for row in rows for entry in row.items()]
    shown = list(dict.fromkeys(name for name, value in entries if name.startswith("loss_") and value))
    columns = max(1, min(columns, len(shown)))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 3 * max(1, lines)), layout="constrained")
    for place, loss in enumerate(shown, 1):
        axes = figure.add_subplot(lines, columns, place)
        for index, (run, rows) in enumerate(runs.items()):
            values = np.array([row.get(loss, np.nan) for row in rows])
            if np.nan_to_num(values).any():
                mark = "o" if len(rows) == 1 else ""
                axes.plot(_steps(rows), values, f"C{index}{mark}-", label=run)
        axes.set_title(loss, fontsize=10, parse_math=False)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    for axes in figure.axes[:1]:
        for text in axes.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    return figure


def _steps(rows: list[dict[str, Any]]) -> list[int]:
    """Steps taken at each row, counted through epochs; an epoch's last row tells its length."""
    taken, before, epoch, last = [], 0, None, 0
    for row in rows:
        if epoch is not None and row["epoch"] != epoch:
            before += last
        epoch, last = row["epoch"], row["step"] + 1
        taken.append(before + last)
    return taken


def _save(figure: Figure, path: Path) -> None:
    kind = path.suffix.removeprefix(".")
    with atomic_path(path) as temporary, matplotlib.rc_context(SAME_SVG):
        figure.savefig(temporary, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
