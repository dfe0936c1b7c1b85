"""Draw synthetic scenes: a few coloured, patterned shapes on a muted, noisy background.

`draw_scene` chooses the objects, `render` makes the pixels. Boxes are [x1, y1, x2, y2] in whole pixels, x2 and y2
exclusive. language.py has the phrases and captions of a scene.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

T = TypeVar("T")
_Box = tuple[int, int, int, int]

COLOURS = {
    "red": (214, 36, 36),
    "green": (36, 160, 56),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 48),
    "purple": (142, 44, 172),
    "orange": (248, 134, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
REFERENCE = 96  # mean side in pixels of an image; the pixel sizes below are for such an image
SIDES = {"small": (16, 20), "big": (32, 40)}  # shortest and longest long side of a shape, in pixels
# Each shape has its own pattern, as kinds of real objects have: a small ViT learns patterns in a hundred steps, and
# outlines hardly at all (docs/scenes.md).
STRIPE = 3  # width in pixels of a stripe, or of a cell of a checkerboard
CONTRAST = 0.8  # of a pattern: 0 is the plain colour, 1 black or white
# Only testB asks for these (colour, shape) pairs. Training shows each colour and each shape, but not the pair.
HELD_OUT = (("red", "square"), ("green", "star"), ("blue", "triangle"), ("yellow", "cross"), ("purple", "circle"))
ANGLES = (-12, -6, 0, 6, 12)  # degrees; few, so that masks can be cached
SUPERSAMPLING = 4


class Thing(NamedTuple):
    """An object of a scene.

    Args:
        size: "small" or "big".
        side: the longer side of its box, in pixels.
        angle: in degrees.
        rgb: the colour that is drawn, each value about 0 to 255.
    """

    colour: str
    shape: str
    size: str
    side: int
    angle: int
    rgb: tuple[float, float, float]
    box: _Box

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


class Scene(NamedTuple):
    """The objects of an image of width x height pixels. Their boxes do not overlap."""

    width: int
    height: int
    things: tuple[Thing, ...]

    @property
    def scale(self) -> float:
        """Size of the image relative to one of REFERENCE pixels; shapes and stripes grow by it."""
        return math.sqrt(self.width * self.height) / REFERENCE


def pick(rng: Generator, items: Sequence[T]) -> T:
    """A random item."""
    return items[int(rng.random() * len(items))]  # several times faster than rng.integers


def shuffled(rng: Generator, items: Sequence[T]) -> list[T]:
    """The items in random order."""
    keys = rng.random(len(items)).tolist()
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


# ---- drawing a scene's content


def draw_scene(rng: Generator, size: int = REFERENCE, held_out: bool = False) -> Scene:
    """Choose the objects of a scene: 3 to 6 of them, in an image of aspect ratio 1:1, 4:3 or 3:4.

    Args:
        size: mean of width and height, in pixels.
        held_out: whether one or two objects are `HELD_OUT` pairs; otherwise none is.
    """
    wide, narrow = round(size * 7 / 6), round(size * 7 / 8)
    width, height = pick(rng, ((size, size), (wide, narrow), (narrow, wide)))
    looks = _draw_looks(rng, int(rng.integers(3, 7)), int(rng.integers(1, 3)) if held_out else 0)
    things = None
    while things is None:  # the objects did not fit: try other sizes and places
        things = _place(rng, looks, width, height, size / REFERENCE)
    return Scene(width, height, tuple(shuffled(rng, things)))


def _draw_looks(rng: Generator, count: int, held_out: int) -> list[tuple[str, str]]:
    """(colour, shape) of each object. Most repeat a colour or a shape, so that a phrase needs both words."""
    looks = shuffled(rng, HELD_OUT)[:held_out]
    while len(looks) < count:
        colour, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
        if looks and (choice := rng.random()) < 0.85:
            other = pick(rng, looks)
            colour = other[0] if choice < 0.4 or choice > 0.75 else colour
            shape = other[1] if choice >= 0.4 else shape
        if (colour, shape) not in HELD_OUT and looks.count((colour, shape)) < 2:
            looks.append((colour, shape))
    return looks


def _place(rng: Generator, looks: list[tuple[str, str]], width: int, height: int, scale: float) -> list[Thing] | None:
    """The objects with random sizes and places; None if they do not fit without touching."""
    margin = max(1, round(2 * scale))
    things: list[Thing] = []
    for colour, shape in looks:
        size, (low, high) = pick(rng, tuple(SIDES.items()))
        side = round((low + (high - low) * rng.random()) * scale)
        angle = pick(rng, ANGLES)
        h, w = shape_mask(shape, side, angle).shape
        tone, *shifts = (rng.random(4) * (0.18, 16, 16, 16) + (0.88, -8, -8, -8)).tolist()
        r, g, b = (value * tone + shift for value, shift in zip(COLOURS[colour], shifts, strict=True))
        for u, v in rng.random((30, 2)).tolist():
            x, y = 1 + int(u * (width - w - 1)), 1 + int(v * (height - h - 1))
            box = (x, y, x + w, y + h)
            if all(_gap(box, other.box) > margin for other in things):
                things.append(Thing(colour, shape, size, side, angle, (r, g, b), box))
                break
        else:
            return None
    return things


def _gap(a: _Box, b: _Box) -> int:
    """Pixels between two boxes, the larger of the horizontal and the vertical gap; negative when they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


# ---- rendering


def thing_mask(scene: Scene, thing: Thing) -> np.ndarray:
    """The pixels of which an object covers at least half: bool (height, width) of its scene."""
    x1, y1, x2, y2 = thing.box
    mask = np.zeros((scene.height, scene.width), bool)
    mask[y1:y2, x1:x2] = shape_mask(thing.shape, thing.side, thing.angle) >= 0.5
    return mask


@functools.cache
def shape_mask(shape: str, side: int, angle: int) -> np.ndarray:
    """How much of each pixel a shape covers, float32 (h, w) in [0, 1]; max(h, w) is about `side`.

    Rows and columns without a pixel that is covered by at least a quarter are cut off.
    """
    c, s = (f(math.radians(0 if shape == "circle" else angle)) for f in (math.cos, math.sin))
    corners = np.array(_outline(shape)) @ np.array([[c, s], [-s, c]])
    corners -= corners.min(0)
    corners *= side * SUPERSAMPLING / corners.max()
    width, height = (math.ceil(v / SUPERSAMPLING) for v in corners.max(0))
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    # ImageDraw counts pixel centres and fills the last pixel of an edge too.
    ImageDraw.Draw(canvas).polygon([(x - 0.5, y - 0.5) for x, y in corners.tolist()], fill=255)
    coverage = np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255
    rows, columns = (np.flatnonzero((coverage >= 0.25).any(axis)) for axis in (1, 0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners (x, y) of a shape around the origin, y downwards."""
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "cross":
        a, b = 0.34, 1.0
        quarter = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return quarter + [(-x, -y) for x, y in quarter]
    radii, count = {"circle": ((1.0,), 48), "triangle": ((1.0,), 3), "star": ((1.0, 0.42), 10)}[shape]
    turns = [2 * math.pi * k / count for k in range(count)]
    return [(radii[k % len(radii)] * math.sin(t), -radii[k % len(radii)] * math.cos(t)) for k, t in enumerate(turns)]


def pattern(shape: str, height: int, width: int, stripe: float) -> np.ndarray:
    """The pattern of a shape, float32 (height, width) in [-1, 1]: -1 is black, 0 the shape's own colour, 1 white.

    Args:
        stripe: width in pixels of a stripe, or of a cell of a checkerboard.
    """
    across, along = (np.sin((np.arange(length) + 0.5) * (math.pi / stripe)) for length in (width, height))
    checks = 2 * along[:, None] * across
    waves = {"circle": -1.0, "square": across, "triangle": along[:, None], "star": checks, "cross": checks}
    covered = np.clip(0.5 + 1.5 * waves[shape], 0, 1)  # soft edges
    sign = -1 if shape in ("square", "cross") else 1
    return np.broadcast_to(sign * CONTRAST * covered, (height, width)).astype(np.float32)


def render(scene: Scene, rng: Generator) -> np.ndarray:
    """The image of a scene, uint8 (height, width, 3) RGB. The objects do not change what is drawn from `rng`."""
    pixels = np.array(_background(scene.width, scene.height, rng), np.float32)
    noise = np.frombuffer(rng.bytes(pixels.size), np.int8).reshape(pixels.shape)  # uniform in -128..127, fast
    amplitude = np.float32(rng.uniform(6, 16) / 128)
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        coverage = shape_mask(thing.shape, thing.side, thing.angle)[..., None]
        region = pixels[y1:y2, x1:x2]
        tint = pattern(thing.shape, y2 - y1, x2 - x1, STRIPE * scene.scale)[..., None]
        colour = np.array(thing.rgb, np.float32)
        colour = colour + np.where(tint > 0, 255 - colour, colour) * tint
        region += coverage * (colour - region)
    pixels += noise * amplitude
    return pixels.clip(0, 255, out=pixels).astype(np.uint8)


def _background(width: int, height: int, rng: Generator) -> Image.Image:
    """A smooth, muted background with a few faint strokes."""
    grid = rng.uniform(80, 180) + rng.uniform(-35, 35, (4, 4, 1)) + rng.uniform(-16, 16, (4, 4, 3))
    image = Image.fromarray(grid.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 5))):
        x1, y1, x2, y2 = rng.uniform(0, 1, 4)
        gray = rng.uniform(80, 180)
        r, g, b = (int(v) for v in gray + rng.uniform(-14, 14, 3))
        draw.line((x1 * width, y1 * height, x2 * width, y2 * height), fill=(r, g, b), width=int(rng.integers(1, 3)))
    return image
