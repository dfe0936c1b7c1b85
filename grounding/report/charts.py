"""Charts of the report as data URIs of SVG: the page needs no other file, and equal charts are equal texts."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grounding.pictures.render import data_uri, svg

# Okabe and Ito's colours, told apart by the colour-blind; the marks tell them apart in black and white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = "os^Dv<>"
LETTERS = 44  # that fit under a panel at 8 pt; longer names are drawn aslant


def chart(panels: Mapping[str, pd.DataFrame], joined: bool = True) -> str:
    """Panels one under the other, of accuracies in 0..1 with their intervals.

    Args:
        panels: a panel's title -> `Interval`s, a row for each place on the x axis and a column for each line.
        joined: whether the points of a line are connected.
    """
    figure = Figure(figsize=(4.5, 2.6 * len(panels) + 0.4), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, name in zip(all_axes, panels, strict=True):
        axes.set_title(name, fontsize=10, parse_math=False)
        _draw(axes, panels[name], joined)
    _legend(figure, *all_axes[0].get_legend_handles_labels())
    return data_uri("image/svg+xml", svg(figure))


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """The names below the panels, in as many columns as fit into the figure's width."""
    lines = [textwrap.fill(name, LETTERS) for name in names]
    for columns in range(min(4, len(names)), 0, -1):
        legend = figure.legend(handles, lines, loc="outside lower center", ncols=columns, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def _draw(axes: Axes, grid: pd.DataFrame, joined: bool) -> None:
    places, lines = grid.index.tolist(), grid.columns
    x = np.arange(len(places))
    spread = 0.5 / max(1, len(lines))
    line = "-" if joined and len(x) > 1 else "none"
    for index, name in enumerate(lines):
        mean, low, high = 100 * np.array(grid[name].tolist(), float).reshape(-1, 3).T
        shift = (index - (len(lines) - 1) / 2) * spread
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)], "ms": 5}
        error = np.nan_to_num([mean - low, high - mean]).clip(0)
        axes.errorbar(x + shift, mean, error, label=name, ls=line, lw=1, elinewidth=1.2, capsize=2, **style)
    aslant = sum(len(place) + 2 for place in places) > LETTERS
    turn: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if aslant else {}
    axes.set_xticks(x, places, fontsize=8, parse_math=False, **turn)
    axes.set_xlim(-0.6, len(x) - 0.4)
    axes.set_ylabel("%")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
