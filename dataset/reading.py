"""Reading files with errors that say which file, which entry, and what to do."""

import codecs
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image

from dataset.images import decode, opened
from files import decode_text, parse_json, unique_keys, why_unusable
from utils import UserError

PIECE = 1 << 20  # bytes of a stream that are read at a time
AT_ONCE = 16 << 20  # bytes of one annotation: a file of one image, or one entry of a list. The real ones are below 1 MB
WHOLE = 16 << 20  # bytes of a list that is read whole; larger ones are streamed
OPENING = re.compile(r"\[[ \t\n\r]*(?=[^ \t\n\r])(\]?)[ \t\n\r]*")  # up to the first item, or past an empty list
CLOSING = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")  # what follows an item
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
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
    """The items of a JSON file that holds a list, one in memory at a time if the file is large; raises `DataError`."""
    large = os.path.exists(path) and os.path.getsize(path) > WHOLE
    yield from _streamed(path) if large else load_json(path, list)


def _streamed(path: str | Path) -> Iterator[Any]:
    count = 0
    try:
        with open(path, "rb") as file:
            head = file.peek(8)[:8]
            if head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
                raise DataError(f"{path}: not a text file (it is compressed: unpack it first, with gunzip or unzip)")
            utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            for item in json_items(file, "utf-16" if utf16 else "utf-8-sig"):
                yield item
                count += 1
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path in the config") from error
    except json.JSONDecodeError as error:
        if not count and error.doc.startswith("{"):
            raise DataError(
                f"{path}: expected a JSON list, found an object; if it holds JSON lines, one value each, make one list "
                "of them, say with: jq -s . FILE"
            ) from None
        raise DataError(f"{path}: entry {count}: not valid JSON ({error.msg}); is the file complete?") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file ({error.reason}), after {count} entries or more") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: entry {count}: {why_unusable(error)}") from None


def json_items(file: IO[bytes], encoding: str = "utf-8-sig") -> Iterator[Any]:
    """The items of a JSON list; what fails to decode is tried again with more of the file, up to `AT_ONCE`.

    Python's `json`, which is fast, decodes each.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValueError, RepeatedKey: the file is no such list.
    """
    decode = codecs.getincrementaldecoder(encoding)().decode
    text, at, mark, data = "", 0, "", b""  # mark: what the list has before `at`: nothing yet, a comma, or its end
    while mark != "]" or data:
        data = file.read(max(PIECE, len(text) - at))
        text, at = (text[at:] + decode(data, not data)).lstrip(" \t\n\r"), 0
        if mark == "]" and text:
            raise json.JSONDecodeError("Extra data after the list", text, 0)
        try:
            if not mark:
                at, mark = _mark(OPENING, text, at, "Expecting value")
            while mark != "]":
                item, end = DECODER.raw_decode(text, at)
                at, mark = _mark(CLOSING, text, end, "Expecting ',' delimiter")  # where the text is cut, 1 may be 12
                yield item
        except json.JSONDecodeError:
            if not data or len(text) - at > AT_ONCE:
                raise


def _mark(pattern: re.Pattern[str], text: str, at: int, refusal: str) -> tuple[int, str]:
    """Where a match at a place ends, and the mark in it; raises `JSONDecodeError` where nothing matches."""
    match = pattern.match(text, at)
    if match is None:
        raise json.JSONDecodeError(refusal, text, at)
    return match.end(), match[1] or ","


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
