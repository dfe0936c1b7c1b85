"""Draw an image with its heat map, boxes and point: the one renderer of demo, page, TensorBoard, report and documents.

Everything is drawn in the coordinates of the image, whatever the size of the file or of the picture.
"""

import base64
import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from utils import UserError, atomic_path

DPI = 120
COLORMAP = "viridis"
STRENGTH, RAMP = 0.75, 0.7  # opacity where the map is highest, and the exponent with which it falls
BEST, TRUTH, POINT = "#ff3b30", "white", "white"
RIGHT, WRONG = "#22c55e", "#ef4444"  # a point inside and outside of the true boxes


class DrawnBox(NamedTuple):
    """A box [x, y, w, h] in pixels of the image, and how it is drawn; `style` is "-" or "--"."""

    box: Sequence[float]
    colour: str = TRUTH
    style: str = "--"


def draw(
    axes: Axes,
    image: Image.Image,
    size: tuple[int, int],
    heat: np.ndarray | None = None,
    colours: str | Colormap = COLORMAP,
    boxes: Iterable[DrawnBox] = (),
    point: tuple[int, int] | None = None,
    point_colour: str = POINT,
    scale: float = 1.0,
) -> AxesImage | None:
    """Draw an image and what is known of it; returns the heat map's artist, for a colour bar.

    Args:
        image: RGB, of any size; it is reduced to the dots that show it.
        size: (height, width) that boxes and point (x, y) refer to.
        heat: float (h, w) in [0, 1], stretched over the image.
        boxes: the last is drawn on top; the gaps of a dashed one show a solid one below.
        scale: of lines and point.
    """
    height, width = shown_size(image.size, axes)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
    axes.set_axis_off()
    axes.imshow(np.asarray(image), extent=extent, aspect="auto")
    colours = see_through(colours) if isinstance(colours, str) else colours
    drawn = None
    if heat is not None:
        drawn = axes.imshow(heat, extent=extent, aspect="auto", cmap=colours, vmin=0, vmax=1)
    for (x, y, w, h), colour, style in boxes:
        edge = Rectangle((x - 0.5, y - 0.5), w, h, fill=False, ec=colour, ls=style, lw=2 * scale, joinstyle="miter")
        edge.set(clip_on=False, path_effects=[withStroke(linewidth=4 * scale, foreground="black")])
        axes.add_patch(edge)
    if point is not None:
        axes.add_line(point_marker(*point, point_colour, scale))
    return drawn


def point_marker(x: float, y: float, colour: str = POINT, scale: float = 1.0) -> Line2D:
    """A disc with a black edge."""
    look: dict[str, Any] = {"mfc": colour, "mec": "black", "ms": 9 * scale, "mew": 1.8 * scale}
    return Line2D([x], [y], marker="o", ls="none", label="point", clip_on=False, zorder=5, **look)


@functools.cache
def see_through(name: str, strength: float = STRENGTH, ramp: float = RAMP) -> Colormap:
    """A colour map of matplotlib whose opacity is `strength` times the value to the power of `ramp`.

    Raises `UserError` when matplotlib has no colour map of that name.
    """
    if name not in matplotlib.colormaps:
        raise UserError(f"--colormap {name}: no colour map of matplotlib; for instance viridis, magma, cividis or jet")
    steps = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps[name](steps)
    colours[:, 3] = strength * steps**ramp
    return ListedColormap(colours)


def shown_size(size: tuple[int, int], axes: Axes) -> tuple[int, int]:
    """(height, width) to show an image of (width, height) pixels with: no more than it has, nor than the axes have."""
    box = axes.get_window_extent()
    return min(size[1], max(1, round(box.height))), min(size[0], max(1, round(box.width)))


# ---- a figure as pixels


def pixels(figure: Figure) -> np.ndarray:
    """A figure as RGB (height, width, 3) uint8, the pixels that `save` writes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(figure: Figure, compress_level: int = 6) -> bytes:
    """A figure as PNG; level 1 takes half the time of level 6 and makes a larger file."""
    return _encoded(figure, format="png", pil_kwargs={"compress_level": compress_level})


def svg(figure: Figure) -> bytes:
    """A figure as SVG; equal figures give equal files."""
    with matplotlib.rc_context({"svg.hashsalt": "amc"}):  # else ids are drawn at random
        return _encoded(figure, format="svg", metadata={"Date": None, "Creator": None})


def _encoded(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi="figure", **options)
    return buffer.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """A file's content as an address, for a page that needs no other file; `kind` is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def save(figure: Figure, path: Path) -> None:
    """Write a figure, under a temporary name first: as SVG where the file's name says so, else as PNG."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(svg(figure) if path.suffix == ".svg" else png(figure))
