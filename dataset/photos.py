"""Photographs as people have them: turned by EXIF, given by paths, folders and patterns, or uploaded.

Data sets are read by `dataset.reading` instead, which leaves EXIF alone: their boxes are those of the pixels as stored.
"""

import glob
import os
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from dataset.images import LONGEST_SIDE, decode, formats
from dataset.reading import DataError


def read_photo(
    file: Path | BinaryIO, name: str = "", most_pixels: int | None = None, longest_side: int = LONGEST_SIDE
) -> Image.Image:
    """Decode an image fully, upright and as RGB (`dataset.images.as_rgb`).

    Args:
        file: a path, or an open binary file (an upload).
        name: what messages call it; the path itself unless given.
        most_pixels, longest_side: an image of more is refused by its header, before it is decoded.

    Raises:
        DataError: naming it, when it is missing, broken, too large, or not an image.
    """
    name = name or str(file)
    try:
        return decode(file, upright=True, most_pixels=most_pixels, longest_side=longest_side)
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: cannot be decoded ({error}); make the image smaller first") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such image") from None
    except IsADirectoryError:
        raise DataError(f"{name}: a folder, not an image") from None
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: {error}; convert it to one of these") from None
    except Exception as error:  # a decoder can raise anything
        problem = str(error) or type(error).__name__
        raise DataError(f"{name}: cannot be decoded ({problem}); is the file complete?") from error


def find_images(words: list[str], remedy: str = "check the path", skip_missing: bool = False) -> list[Path]:
    """The image files that words name: files, folders (their images, not those of folders inside), patterns.

    Files as they are named, a folder's and a pattern's by name; none twice. Hidden files of folders are passed over.

    Args:
        skip_missing: a word that names nothing comes back as the path of a file, which `read_photo` then refuses.

    Raises:
        DataError: a word names nothing, or a folder without images; it ends with `remedy`.
    """
    found: list[Path] = []
    for word in words:
        path, is_folder = Path(word), os.path.isdir(word)  # which, unlike pathlib's, raise nothing at odd names
        if is_folder:
            inside = sorted(file for file in path.iterdir() if file.is_file() and _is_image(file.name))
        elif os.path.exists(word):
            inside = [path]
        else:
            inside = sorted(file for file in map(Path, glob.glob(word)) if file.is_file())
        if not inside and (is_folder or not skip_missing):
            what = "holds no image" if is_folder else "no such file, folder or pattern"
            raise DataError(f"{word}: {what}; {remedy}")
        found += inside or [path]
    return list(dict.fromkeys(found))


def _is_image(name: str) -> bool:
    """Whether a file of a folder is an image by its name; a hidden one is macOS's or an editor's."""
    return not name.startswith(".") and Image.registered_extensions().get(Path(name).suffix.lower()) in formats()
