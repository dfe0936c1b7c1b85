"""What is where in a figure, for tests of pictures."""

import matplotlib.text
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.random import default_rng
from PIL import Image


def photo(width: int, height: int) -> Image.Image:
    """Noise with a red upper left corner."""
    shades = default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    shades[: height // 2, : width // 2] = (255, 0, 0)
    return Image.fromarray(shades)


def at(axes: Axes, drawn: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    """The colour of a figure, drawn by `render.pixels`, at a place in an image's coordinates."""
    across, up = axes.transData.transform((x, y))
    return tuple(drawn[round(len(drawn) - 1 - up), round(across)].tolist())


def assert_texts_are_apart(figure: Figure, whole: bool = False) -> None:
    """No text lies on another or on a panel, but in a chart of its own; `whole`: none leaves the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    off = [axis for axes in figure.axes if not axes.axison for axis in (axes.xaxis, axes.yaxis)]
    hidden = {text for axis in off for text in axis.findobj(matplotlib.text.Text)}
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible() and t not in hidden]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert len(texts) >= 4
    for number, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        panels = [axes.get_window_extent() for axes in figure.axes if not (axes.axison and text in axes.texts)]
        for other in (*boxes[:number], *panels):
            assert not box.padded(-1).overlaps(other.padded(-1)), text
        if whole:
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text
