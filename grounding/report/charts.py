"""Charts of the report as data URIs of SVG, so that the page needs no other file. Names are drawn as they are."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grounding.pictures.overlay import data_uri
from grounding.pictures.panels import SAME_SVG
from grounding.report.statistics import Interval

# Okabe and Ito's colours, told apart by the colour-blind; the marks tell them apart in black and white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = "os^Dv<>"
LETTERS = 44  # of 8 pt have room under a panel; more are written aslant


class Panel(NamedTuple):
    """Accuracies in 0..1 with their intervals: a point per place on the x axis, a line per name.

    Args:
        places: the names along the x axis.
        lines: name -> one interval a place.
    """

    title: str
    places: Sequence[str]
    lines: Mapping[str, Sequence[Interval]]


def chart(panels: Sequence[Panel], joined: bool = True) -> str:
    """The panels, of the same lines, one under the other, as a data URI.

    Args:
        joined: draw lines between the points of neighbouring places.
    """
    figure = Figure(figsize=(4.5, 2.6 * len(panels) + 0.4), layout="constrained")
    axes_of = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(axes_of, panels, strict=True):
        _draw(axes, panel, joined)
    _legend(figure, *axes_of[0].get_legend_handles_labels())
    return svg_uri(figure)


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """The names below the panels, in as many columns as the figure is wide enough for."""
    lines = [textwrap.fill(name, LETTERS) for name in names]
    for columns in range(min(4, len(names)), 0, -1):
        legend = figure.legend(handles, lines, loc="outside lower center", ncols=columns, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def _draw(axes: Axes, panel: Panel, joined: bool) -> None:
    x = np.arange(len(panel.places))
    spread = 0.5 / max(1, len(panel.lines))
    for index, (name, row) in enumerate(panel.lines.items()):
        mean, low, high = 100 * np.array(row, float).reshape(-1, 3).T
        shift = (index - (len(panel.lines) - 1) / 2) * spread
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)], "ms": 5}
        error = np.nan_to_num([mean - low, high - mean]).clip(0)
        line = "-" if joined and len(x) > 1 else "none"
        axes.errorbar(x + shift, mean, error, label=name, ls=line, lw=1, elinewidth=1.2, capsize=2, **style)
    aslant = sum(len(place) + 2 for place in panel.places) > LETTERS
    turn: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if aslant else {}
    axes.set_xticks(x, panel.places, fontsize=8, parse_math=False, **turn)
    axes.set_xlim(-0.6, len(x) - 0.4)
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    axes.set_ylabel("%")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)


def svg_uri(figure: Figure) -> str:
    """A figure as data:image/svg+xml, the same for the same figure."""
    content = io.BytesIO()
    with matplotlib.rc_context(SAME_SVG):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return data_uri("image/svg+xml", content.getvalue())
