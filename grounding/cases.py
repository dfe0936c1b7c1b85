"""Which expressions of an evaluation a report shows pictures of, and the pictures."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from dataset.expressions import Expression
from dataset.reading import read_image
from grounding.charts import data_uri
from grounding.outcomes import size_of
from grounding.page import Case, Shot
from grounding.visualize import panel

JPEG_QUALITY = 82


class Explained(NamedTuple):
    """What one model says of all expressions: its maps, and whether each map's point is right (1, 0 or NaN)."""

    name: str
    maps: Sequence[Tensor | None]
    right: np.ndarray


def extremes(values: np.ndarray, images: Sequence[Path], count: int) -> tuple[list[int], list[int], list[int]]:
    """Positions of the highest, the most median and the lowest values, each up to `count`, at most one of an image.

    Of few images, each gets a third, so that the best and the worst do not meet. Equal values are taken in their order;
    NaN never; none twice.

    Args:
        values, images: one an expression.
    """
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return [], [], []
    count = min(count, math.ceil(len({images[i] for i in known.tolist()}) / 3))
    used: set[Path] = set()
    orders = (-values, values, np.abs(values - np.median(values[known])))
    best, worst, typical = (
        pick((known[i] for i in np.argsort(order[known], kind="stable")), images, count, used) for order in orders
    )
    return best, typical, worst


def pick(order: Iterable[int], images: Sequence[Path], count: int, used: set[Path] | None = None) -> list[int]:
    """The first `count` positions of an order whose images are not in `used`, which takes them in."""
    used = set() if used is None else used
    chosen: list[int] = []
    for position in map(int, order):
        if len(chosen) == count:
            break
        if images[position] not in used:
            used.add(images[position])
            chosen.append(position)
    return chosen


def picture(position: int, expression: Expression, models: Sequence[Explained], note: str = "") -> Case:
    """An expression as the report shows it: the image with its true boxes, then each model's map and point."""
    image = read_image(expression.image, expression.text)
    size, boxes = size_of(expression), expression.boxes
    shots = [Shot("image", _uri(panel(image, size, boxes, None)), None)]
    for model in models:
        pred = model.maps[position]
        if pred is not None:
            right = bool(model.right[position])
            shots.append(Shot(model.name, _uri(panel(image, size, boxes, pred, right)), right))
    return Case(expression.text, note, shots)


def _uri(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=JPEG_QUALITY)
    return data_uri("image/jpeg", content.getvalue())
