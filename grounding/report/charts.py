"""Charts of the report as data URIs of SVG, so that the page needs no other file. Names are drawn as they are."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grounding.pictures.panels import SAME_SVG
from grounding.pictures.render import data_uri

# Okabe and Ito's colours, told apart by the colour-blind; the marks tell them apart in black and white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = "os^Dv<>"
LETTERS = 44  # that fit under a panel at 8 pt; longer names are drawn aslant


class Panel(NamedTuple):
    """Accuracies in 0..1: `grid` holds `Interval`s, a row for each place on the x axis and a column for each line."""

    title: str
    grid: pd.DataFrame


def chart(panels: Sequence[Panel], joined: bool = True) -> str:
    """The panels, of the same lines, one under the other, as a data URI; `joined`: connect the points of a line."""
    figure = Figure(figsize=(4.5, 2.6 * len(panels) + 0.4), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel, joined)
    _legend(figure, *all_axes[0].get_legend_handles_labels())
    return svg_uri(figure)


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


def _draw(axes: Axes, panel: Panel, joined: bool) -> None:
    places, lines = panel.grid.index.tolist(), panel.grid.columns
    x = np.arange(len(places))
    spread = 0.5 / max(1, len(lines))
    line = "-" if joined and len(x) > 1 else "none"
    for index, name in enumerate(lines):
        mean, low, high = 100 * np.array(panel.grid[name].tolist(), float).reshape(-1, 3).T
        shift = (index - (len(lines) - 1) / 2) * spread
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)], "ms": 5}
        error = np.nan_to_num([mean - low, high - mean]).clip(0)
        axes.errorbar(x + shift, mean, error, label=name, ls=line, lw=1, elinewidth=1.2, capsize=2, **style)
    aslant = sum(len(place) + 2 for place in places) > LETTERS
    turn: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if aslant else {}
    axes.set_xticks(x, places, fontsize=8, parse_math=False, **turn)
    axes.set_xlim(-0.6, len(x) - 0.4)
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    axes.set_ylabel("%")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)


def svg_uri(figure: Figure) -> str:
    """A figure as data:image/svg+xml; equal figures give equal texts."""
    content = io.BytesIO()
    with matplotlib.rc_context(SAME_SVG):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return data_uri("image/svg+xml", content.getvalue())
