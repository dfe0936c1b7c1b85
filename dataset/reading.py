"""Reading files with errors that say which file, which entry, and what to do."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from utils import UserError, decode_text, parse_json

BROKEN = (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError)  # of decoding images


class DataError(UserError):
    """A data file or entry that cannot be used; the message names the file, the entry and the remedy."""


def read_text(path: str | Path, named_by: str) -> str:
    """`decode_text` of a file; raises `DataError`, with `named_by` as what to check in the config."""
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


def read_image(path: str | Path, source: str) -> Image.Image:
    """Decode an image fully, as RGB; raises `DataError` naming it and its entry (`source`) when missing or broken."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{source}: image {path} does not exist; check image_root") from None
    except BROKEN as error:
        raise DataError(f"{source}: image {path} cannot be decoded ({error}); is the download complete?") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header."""
    with Image.open(path) as image:
        return image.height, image.width
