"""Reading files with errors that say which file, which entry, and what to do."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dataset.images import decode, opened
from files import decode_text, parse_json
from utils import UserError

SKIP = " (--skip_broken goes on without it)"


class DataError(UserError):
    """A data file or entry that cannot be used; the message names the file, the entry and the remedy."""


def read_text(path: str | Path, named_by: str) -> str:
    """Read a text file; raises `DataError`, which says to check `named_by` in the config."""
    try:
        return decode_text(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check {named_by} in the config") from error
    except ValueError as error:
        raise DataError(f"{path}: not a text file ({error})") from error


def load_json(path: str | Path, kind: type) -> Any:
    """Read a JSON file whose top level is a `kind` (list or dict); raises `DataError`, for a repeated key as well."""
    text = read_text(path, "the path")
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); is the file complete?") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(value, kind):
        raise DataError(f"{path}: expected a JSON {kind.__name__}, found a {type(value).__name__}")
    return value


def read_list(path: str | Path) -> Iterator[Any]:
    """The items of a JSON file that holds a list; raises `DataError`."""
    yield from load_json(path, list)


def read_image(path: str | Path, source: str) -> Image.Image:
    """Decode an image of a data set, as RGB and not turned; raises `DataError` naming it and its entry (`source`)."""
    with _named(f"{source}: image {path}"):
        return decode(Path(path))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header; raises `DataError` naming it."""
    with _named(f"image {path}"), opened(Path(path)) as image:
        return image.height, image.width


@contextlib.contextmanager
def _named(image: str) -> Iterator[None]:
    """Turn any error of reading an image into a `DataError` that names it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{image} does not exist; check image_root{SKIP}") from None
    except Exception as error:  # a decoder can raise anything
        problem = str(error) or type(error).__name__
        remedy = "make it smaller" if isinstance(error, Image.DecompressionBombError) else "is the download complete?"
        raise DataError(f"{image} cannot be decoded ({problem}); {remedy}{SKIP}") from error
