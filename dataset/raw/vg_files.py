"""Visual Genome's files, unpacked or in the owners' .zip, read as a stream: one entry is in memory at a time.

They have up to 4 GB. Python's `json` decodes each entry: it is fast, and strict about what JSON is.
"""

import codecs
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from dataset.raw.archives import AT_ONCE, BROKEN_ZIP, check_ratio, visible_members
from dataset.reading import DataError
from files import RepeatedKey, unique_keys

Row = dict[str, Any]
KINDS = ("image_data", "region_descriptions", "attributes", "objects")
NAME = re.compile(rf"({'|'.join(KINDS)})(?:_v\d[\d_.]*)?(\.json(?:\.gz|\.zip)?|\.zip)")  # objects_v1_2.json.zip, say
PIECE = 1 << 20  # bytes that are read at a time
BLANKS = " \t\n\r"
OPENING = re.compile(rf"\[[{BLANKS}]*(?=[^{BLANKS}])(\]?)[{BLANKS}]*")  # up to the first item, or past an empty list
CLOSING = re.compile(rf"[{BLANKS}]*([,\]])[{BLANKS}]*")  # what follows an item


def _refuse(constant: str) -> None:
    raise json.JSONDecodeError(f"{constant} is no JSON", constant, 0)


DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=unique_keys)


class RawFile(NamedTuple):
    """A JSON file, or the member of that name of a .zip file."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path} ({self.member})" if self.member else str(self.path)


def find_sources(raw: Sequence[Path]) -> dict[str, RawFile]:
    """The owners' files in folders, or given by name: kind, one of `KINDS`, -> file. A file is preferred to its .zip.

    Raises:
        DataError: a path does not exist or is not such a file, or two are of the same kind.
    """
    found: dict[str, RawFile] = {}
    for path in raw:
        if not path.exists():
            raise DataError(f"{path}: does not exist; give a folder with Visual Genome's files, or the files")
        files = [file for file in sorted(path.iterdir()) if NAME.fullmatch(file.name)] if path.is_dir() else [path]
        names = {file.name for file in files}
        for file in files:
            if file.suffix in (".zip", ".gz") and not names.isdisjoint((file.stem, f"{file.stem}.json")):
                continue
            for kind, source in _contents(file):
                if kind in found:
                    raise DataError(f"{found[kind]} and {source} are both {kind}; give the one to use by its name")
                found[kind] = source
    return found


def _contents(file: Path) -> list[tuple[str, RawFile]]:
    """The kinds of a file, or of the members of a .zip."""
    if file.suffix == ".gz":
        raise DataError(f"{file}: is compressed by gzip; unpack it first (gunzip)")
    sources = [RawFile(file)]
    if file.suffix == ".zip":
        with _readable(file), zipfile.ZipFile(file) as archive:
            sources = [RawFile(file, info.filename) for info in visible_members(archive)]
    named = [(NAME.fullmatch((source.member or file.name).rpartition("/")[2]), source) for source in sources]
    found = [(match[1], source) for match, source in named if match and match[2] == ".json"]
    if not found:
        raise DataError(f"{file}: none of Visual Genome's files ({', '.join(f'{kind}.json' for kind in KINDS)})")
    return found


def stream_items(source: RawFile) -> Iterator[Any]:
    """The items of the list that a file holds, one after the other; shows progress on a terminal.

    Raises:
        DataError: the file cannot be read or unpacked, is no JSON list, or an object in it has a key twice.
    """
    with _readable(source), ExitStack() as stack:
        file: Any = stack.enter_context(open(source.path, "rb"))
        size = source.path.stat().st_size
        if source.member is not None:
            archive = stack.enter_context(zipfile.ZipFile(file))
            info = archive.getinfo(source.member)
            check_ratio(source.path, info)
            file, size = stack.enter_context(archive.open(info)), info.file_size
        start = file.peek(8)
        if start.startswith(b"\x1f\x8b"):
            raise DataError(f"{source}: is compressed by gzip, whatever its name says; unpack it first (gunzip)")
        start = start.removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"{"):
            raise DataError(
                f"{source}: expected a JSON list, found an object; is it Visual Genome's file? If it holds an object a "
                "line, make a list of them: [...], with commas between"
            )
        if start and not start.startswith(b"["):
            raise DataError(f"{source}: expected a JSON list; is this Visual Genome's file, UTF-8 and complete?")
        with tqdm.wrapattr(file, "read", total=size, desc=source.path.name, disable=None) as stream:
            yield from _items(stream)


def _items(file: IO[bytes]) -> Iterator[Any]:
    """The items of a JSON list in UTF-8; what fails to decode is tried again with more of the file, up to `AT_ONCE`.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError, RepeatedKey: the file is no such list.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, at, mark, data = "", 0, "", b""  # mark: what the list has before `at`: nothing yet, a comma, or its end
    while mark != "]" or data:
        data = file.read(max(PIECE, len(text) - at))
        text, at = (text[at:] + decode(data, not data)).lstrip(BLANKS), 0
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


@contextmanager
def _readable(source: RawFile | Path) -> Iterator[None]:
    """Turn what reading a file raises into a `DataError` that names it."""
    try:
        yield
    except DataError:
        raise
    except RepeatedKey as error:
        kind = f"an object holds a key more than once, and one would be lost ({error.args[0]!r:.60})"
        raise DataError(f"{source}: {kind}; correct the entry or take it out") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        why = getattr(error, "msg", error)
        raise DataError(f"{source}: not valid JSON ({why}); is the download complete?") from error
    except BROKEN_ZIP as error:
        raise DataError(f"{source}: cannot be read ({str(error)[:100]}); is the download complete?") from error


class Draft:
    """JSON objects of each image in a temporary file: images are added in any order, and read back by their ids.

    For an output, these are its entries {"image", "caption", "bbox"}, and `dropped` counts the candidates, each a
    phrase with its box, by the rule that dropped them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.places: dict[int, tuple[int, int]] = {}  # image id -> first byte and number of bytes
        self.entries = self.boxes = 0
        self.dropped: Counter[str] = Counter()

    def add(self, image_id: int, rows: Sequence[Row]) -> None:
        """Add all rows of an image; an image without any is not kept."""
        if rows:
            start = self.file.seek(0, os.SEEK_END)
            self.places[image_id] = start, self.file.write(",\n".join(map(json.dumps, rows)).encode())
            self.entries += len(rows)
            self.boxes += sum(len(row.get("bbox", ())) for row in rows)

    def get(self, image_id: int) -> str:
        """The rows of an image, as they stand in a JSON list; empty where none was added."""
        start, length = self.places.get(image_id, (0, 0))
        self.file.seek(start)
        return self.file.read(length).decode()

    def write(self, path: Path) -> None:
        """Write a JSON list, an entry a line, in the order of image ids."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write("[")
            for index, image_id in enumerate(sorted(self.places)):
                file.write((",\n" if index else "\n") + self.get(image_id))
            file.write("\n]\n")
