"""Decoding images: the only place that opens image files, of photographs and of data sets alike.

Which formats are read, of what size, and how all their modes become 8-bit RGB.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "JPEG2000", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF", "PPM")  # none that runs a program
LONGEST_SIDE = 65_535  # pixels, JPEG's own limit; Pillow's own, on width x height, is 179 megapixels
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # one channel of more than 8 bits

# Pillow warns of sizes below its limit and of odd metadata, for each file anew: nothing that a user could act upon.
warnings.filterwarnings("ignore", module=r"PIL\.")


@contextlib.contextmanager
def opened(
    file: Path | BinaryIO, most_pixels: int | None = None, longest_side: int = LONGEST_SIDE
) -> Iterator[Image.Image]:
    """An image whose header is read: its format, and its size as stored.

    Args:
        most_pixels, longest_side: an image of more is refused; None: by Pillow's limit of pixels alone.

    Raises:
        FileNotFoundError, IsADirectoryError, NotADirectoryError: `file` is no file.
        UnidentifiedImageError: it is of none of `FORMATS`.
        Image.DecompressionBombError: it has too many pixels, or too long a side.
        Exception: a decoder can raise anything at a damaged file.
    """
    try:
        image = Image.open(file, formats=formats())
    except UnidentifiedImageError:
        kinds = ", ".join(formats())
        raise UnidentifiedImageError(f"not an image, or of another kind than {kinds}") from None
    with image:
        size = f"{image.width} x {image.height} pixels"
        if most_pixels is not None and image.width * image.height > most_pixels:
            raise Image.DecompressionBombError(f"{size}, and at most {most_pixels / 1e6:g} megapixels are read")
        if max(image.size) > longest_side:
            raise Image.DecompressionBombError(f"{size}, and sides of at most {longest_side} are read")
        yield image


def decode(file: Path | BinaryIO, upright: bool = False, **limits: Any) -> Image.Image:
    """Decode an image fully, as RGB; `upright`: turned as its EXIF says. For limits see `opened`, for RGB `as_rgb`."""
    with opened(file, **limits) as image:
        return as_rgb(ImageOps.exif_transpose(image) if upright else image)


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: deep grey scaled down, transparent parts on white; of an animation, the first frame."""
    if image.mode in DEEP:
        image = _eight_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to 8, where Pillow would cut it at 255.

    White is 65535. In modes that do not say how many bits are used, it is 255 if no value is above that; in floats it
    is 1 if no value is above that. If there are values above 65535, the largest is white. NaN and infinity become
    black, the transparent grey becomes white.
    """
    values = np.array(image, np.float32)  # exact enough: it rounds all 16-bit greys as float64 does
    values[~np.isfinite(values)] = 0
    clear = values == image.info.get("transparency", np.nan)
    tops = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    brightest = float(values.max())
    values /= next((top for top in tops if brightest <= top), brightest)
    values *= 255
    np.clip(values, 0, 255, out=values)
    values[clear] = 255
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


@functools.cache
def formats() -> list[str]:
    """Those of `FORMATS` that this Pillow reads."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]
