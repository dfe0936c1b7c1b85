"""Figures of one grounded phrase: its map over the image with point and boxes, and a strip of its words' maps.

Sizes are in inches of a figure of `DPI` dots an inch. They do not depend on the image, so that text and lines can be
read on photographs of any size. A large image is reduced to the dots that show it; a small one keeps its pixels.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from grounding.explain import Grounding
from grounding.maps import ResizedMap, share_of_maximum
from grounding.pictures.render import BEST, COLORMAP, DPI, TRUTH, DrawnBox, draw, point_marker, see_through, shown_size

SIDE, WORD_SIDE = 6.5, 1.9  # the longer side of an image
LEAST_WIDTH, LEAST_BODY = 4.4, 1.5  # of a figure, for its legend; of the colour bar, for its label
MARGIN, BAR, LINE, GAP = 0.15, 0.75, 0.21, 0.1  # around; for the colour bar; a line of text; between parts
WORDS_A_ROW = 6
TITLE = FontProperties(size=12, weight="bold")
PLAIN, SMALL = FontProperties(size=10), FontProperties(size=9)
LONGEST_TITLE = 600  # characters
LONGEST_SLUG = 40


def overlay(
    image: Image.Image,
    found: Grounding,
    truth: Sequence[Sequence[float]] = (),
    colormap: str = COLORMAP,
    side: float = SIDE,
    region: np.ndarray | None = None,
) -> Figure:
    """The map over its image, its point and best box, a colour bar, and the phrase with its match probability.

    Args:
        image: the RGB image that was asked, or a smaller copy of it.
        truth: boxes [x, y, w, h] in pixels of the image, drawn dashed.
        colormap: a name of matplotlib's; "viridis" is perceptually uniform, "jet" is what many papers show.
        side: inches of the image's longer side; with fewer, text and lines are larger beside the image.
        region: more of the truth, bool (height, width) of the image; its outline is drawn dashed.
    """
    colours = see_through(colormap)
    width, height = (side * length / max(found.map.shape) for length in found.map.shape[::-1])
    inner, body = max(width + BAR, LEAST_WIDTH), max(height, LEAST_BODY)
    title = wrap(found.text, inner, TITLE)
    foot = MARGIN + GAP + LINE
    figure = Figure((inner + 2 * MARGIN, foot + body + GAP + LINE * (len(title) + 1) + MARGIN), dpi=DPI)
    _write(figure, title, TITLE)
    _write(figure, [f"match probability {found.match:.3f}"], PLAIN, skip=len(title))
    left = MARGIN + (inner - BAR - width) / 2
    axes = _axes(figure, left, foot + (body - height) / 2, width, height)
    best = [DrawnBox(box.box, BEST, "-") for box in found.boxes[:1]]
    rows, columns = shown_size(found.map.shape[::-1], axes)
    shown = cv2.resize(found.map, (columns, rows), interpolation=cv2.INTER_AREA)
    heat = draw(axes, image, found.map.shape, shown, colours, [*best, *map(DrawnBox, truth)], found.point)
    assert heat is not None
    if region is not None:
        axes.autoscale(False)
        reach = (-1, region.shape[1], -1, region.shape[0])  # one pixel around, so that outlines end at the border
        outline = axes.contour(np.pad(region, 1), [0.5], extent=reach, colors=TRUTH, linestyles="--", linewidths=2)
        outline.set(path_effects=[withStroke(linewidth=4, foreground="black")])
    bar = _axes(figure, left + width + GAP, foot, 0.16, body)
    figure.colorbar(heat, cax=bar, ticks=[0, 0.5, 1]).set_label("share of the maximum", fontsize=9)
    bar.tick_params(labelsize=9)
    handles = [point_marker(0, 0)]
    handles += [_line(BEST, "-", "best box")] if best else []
    handles += [_line(TRUTH, "--", "ground truth")] if len(truth) or region is not None else []
    legend: dict[str, Any] = {"frameon": False, "fontsize": 9, "borderaxespad": 0.3}
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), **legend)
    return figure


def word_strip(image: Image.Image, found: Grounding, colormap: str = COLORMAP) -> Figure:
    """The map of the phrase and of each of its words, each on its own scale, with its share of the whole map.

    Arguments as in `overlay`. In mode "itc", whose map has no words, the whole map stands alone.
    """
    colours = see_through(colormap)
    texts = ["whole phrase", *(f"{word.word} {100 * word.share:.0f}%" for word in found.words)]
    width, height = (WORD_SIDE * length / max(image.size) for length in image.size)
    cell = max(width, 0.55 * WORD_SIDE)
    columns = min(len(texts), WORDS_A_ROW)
    inner = max(columns * (cell + GAP) - GAP, LEAST_WIDTH)
    names = [wrap(text, cell, SMALL) for text in texts]
    title = wrap(found.text, inner, TITLE)
    rows = [names[start : start + columns] for start in range(0, len(names), columns)]
    heads = [LINE * 0.75 * max(map(len, row)) + GAP for row in rows]
    total = LINE * len(title) + sum(heads) + len(rows) * (height + GAP) + LINE
    figure = Figure(figsize=(inner + 2 * MARGIN, total + 2 * MARGIN), dpi=DPI)
    _write(figure, title, TITLE)
    for index, (name, small) in enumerate(
        zip(names, [found.small, *(word.small for word in found.words)], strict=True)
    ):
        row, column = divmod(index, columns)
        x = MARGIN + column * (cell + GAP) + (cell - width) / 2
        above = LINE * len(title) + sum(heads[: row + 1]) + row * (height + GAP)
        axes = _axes(figure, x, MARGIN + total - above - height, width, height)
        shares = share_of_maximum(ResizedMap(torch.from_numpy(small), *shown_size(image.size, axes)))
        draw(axes, image, image.size[::-1], shares, colours)
        axes.set_title("\n".join(name), fontproperties=SMALL, pad=3, parse_math=False)
    note = "each map on its own scale; %: share of the whole map" if found.words else "mode itc: no maps of words"
    inches = figure.dpi_scale_trans
    figure.text(MARGIN, MARGIN, note, fontproperties=SMALL, va="bottom", color="#555555", transform=inches)
    return figure


def slug(text: str) -> str:
    """A phrase as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_SLUG].rstrip("-") or "phrase"


# ---- parts


def wrap(text: str, width: float, font: FontProperties) -> list[str]:
    """Break a text, cut at `LONGEST_TITLE`, into lines of at most `width` inches."""
    renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()

    def fits(line: str) -> bool:
        return renderer.get_text_width_height_descent(line, font, ismath=False)[0] <= width * DPI

    return break_lines(text if len(text) <= LONGEST_TITLE else text[:LONGEST_TITLE] + "…", fits)


def break_lines(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Break a text between words, and within a word that no line holds; a line has at least one character."""
    lines = [""]
    for word in text.split():
        if fits(longer := f"{lines[-1]} {word}".strip()):
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and not fits(lines[-1] + character):
                lines.append("")
            lines[-1] += character
    return lines


def _write(figure: Figure, lines: Sequence[str], font: FontProperties, skip: int = 0) -> None:
    """Lines of text at the top of a figure, below `skip` others."""
    inches: dict[str, Any] = {"transform": figure.dpi_scale_trans, "parse_math": False}
    for index, line in enumerate(lines, start=skip):
        height = figure.get_figheight() - MARGIN - LINE * index
        figure.text(MARGIN, height, line, fontproperties=font, va="top", **inches)


def _axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the figure's lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((x / across, y / up, width / across, height / up))


def _line(colour: str, style: str, label: str) -> Line2D:
    """A line for the legend, as the boxes' edges are drawn."""
    outline = [withStroke(linewidth=4, foreground="black")]
    return Line2D([], [], color=colour, ls=style, lw=2, label=label, path_effects=outline)
