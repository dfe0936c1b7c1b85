"""Photographs as people have them: turned by EXIF, grey, with a palette, transparent, for print.

Data sets are read by `dataset.reading` instead, which leaves EXIF alone: their boxes are those of the pixels as stored.
"""

import glob
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset.reading import BROKEN, DataError

FORMATS = ("JPEG", "JPEG2000", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF", "PPM")  # none that runs a program
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # one channel of more than 8 bits


def read_photo(
    file: Path | BinaryIO, name: str = "", most_pixels: int | None = None, longest_side: int | None = None
) -> Image.Image:
    """Decode an image fully, upright and as RGB, transparent parts on white; of an animation, the first frame.

    Args:
        file: a path, or an open binary file (an upload).
        name: what messages call it; the path itself unless given.
        most_pixels, longest_side: an image of more is refused by its header, before it is decoded.

    Raises:
        DataError: naming it, when it is missing, broken, too large, or not an image.
    """
    name = name or str(file)
    try:
        with Image.open(file, formats=_formats()) as image:
            if most_pixels is not None and image.width * image.height > most_pixels:
                limit = f"at most {most_pixels / 1e6:g} megapixels are read"
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, and {limit}")
            if longest_side is not None and max(image.size) > longest_side:
                limit = f"sides of at most {longest_side} pixels are read"
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, and {limit}")
            return upright_rgb(image)
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: cannot be decoded ({error}); make the image smaller first") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such image") from None
    except IsADirectoryError:
        raise DataError(f"{name}: a folder, not an image") from None
    except UnidentifiedImageError:
        kinds = ", ".join(_formats())
        raise DataError(f"{name}: not an image, or of another kind than {kinds}; convert it to one of these") from None
    except BROKEN as error:
        raise DataError(f"{name}: cannot be decoded ({error}); is the file complete?") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as it is to be looked at: turned as its EXIF says, 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP:
        image = _eight_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow would cut at 255.

    White is 65535; in modes that do not say how many bits are used it is 255 if no value is above that, in floats 1.
    """
    values = np.nan_to_num(np.asarray(image, np.float64))
    tops = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    top = next((top for top in tops if values.max() <= top), tops[-1])
    return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))


def find_images(words: list[str], remedy: str = "check the path") -> list[Path]:
    """The image files that words name: files, folders (their images, not those of folders inside), patterns.

    Files as they are named, a folder's and a pattern's by name; none twice.

    Raises:
        DataError: a word names nothing, or a folder without images; it ends with `remedy`.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in _formats()}
            inside = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in suffixes)
        else:
            inside = [path] if path.exists() else sorted(file for file in map(Path, glob.glob(word)) if file.is_file())
        if not inside:
            what = "holds no image" if path.is_dir() else "no such file, folder or pattern"
            raise DataError(f"{word}: {what}; {remedy}")
        found += inside
    return list(dict.fromkeys(found))


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow reads."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]
