"""Visual Genome's files, unpacked or in the owners' .zip, read as a stream: one entry is in memory at a time."""

import codecs
import json
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from dataset.expressions import EntryProblem
from dataset.raw.archives import AT_ONCE, BROKEN_ZIP, check_ratio, visible_members
from dataset.reading import DataError

KINDS = ("image_data", "region_descriptions", "attributes", "objects")
NAME = re.compile(rf"({'|'.join(KINDS)})(?:_v\d[\d_.]*)?(\.json(?:\.gz|\.zip)?|\.zip)")  # objects_v1_2.json.zip, say
PIECE = 1 << 20  # bytes that are read at a time
SPACE = re.compile("[ \t\n\r]*")


def _refuse(constant: str) -> None:
    raise json.JSONDecodeError(f"{constant} is no JSON", constant, 0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise EntryProblem("an object holds a key more than once, and one would be lost", f"{repeated!r:.60}")
    return row


DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_unique)


class Source(NamedTuple):
    """A JSON file, or the member of that name of a .zip file."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path} ({self.member})" if self.member else str(self.path)


def find_sources(raw: Sequence[Path]) -> dict[str, Source]:
    """The owners' files of each kind of `KINDS` that folders and files hold; of a file and its .zip, the file.

    Raises:
        DataError: a path does not exist or is none of them, or there are several of a kind.
    """
    found: dict[str, list[Source]] = {}
    for path in raw:
        if not path.exists():
            raise DataError(f"{path}: does not exist; give a folder with Visual Genome's files, or the files")
        files = [file for file in sorted(path.iterdir()) if NAME.fullmatch(file.name)] if path.is_dir() else [path]
        names = {file.name for file in files}
        for file in files:
            if file.suffix in (".zip", ".gz") and not names.isdisjoint((file.stem, f"{file.stem}.json")):
                continue
            for kind, source in _contents(file):
                found.setdefault(kind, []).append(source)
    for kind, sources in found.items():
        if len(sources) > 1:
            raise DataError(f"{sources[0]} and {sources[1]} are both {kind}; give the one to use by its name")
    return {kind: sources[0] for kind, sources in found.items()}


def _contents(file: Path) -> list[tuple[str, Source]]:
    """What a file holds, by kind."""
    if file.suffix == ".gz":
        raise DataError(f"{file}: is compressed by gzip; unpack it first (gunzip)")
    if file.suffix == ".zip":
        with _readable(file), zipfile.ZipFile(file) as archive:
            members = [info.filename for info in visible_members(archive)]
        sources = [(name, Source(file, name)) for name in members]
    else:
        sources = [(file.name, Source(file))]
    named = ((NAME.fullmatch(name.rpartition("/")[2]), source) for name, source in sources)
    found = [(match[1], source) for match, source in named if match and match[2] == ".json"]
    if not found:
        raise DataError(f"{file}: none of Visual Genome's files ({', '.join(f'{kind}.json' for kind in KINDS)})")
    return found


def read_entries(source: Source) -> Iterator[Any]:
    """The items of the list that a file holds, one after the other; shows progress on a terminal.

    Raises:
        DataError: the file cannot be read or unpacked, or holds something else.
        EntryProblem: an object of an item holds a key twice.
    """
    with _readable(source), _opened(source) as (file, size):
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
    """The items of a JSON list in UTF-8; what fails to decode is tried again with more of the file, up to `AT_ONCE`."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, at, first, closed, ended = "", 0, True, False, False
    while not ended:
        data = file.read(max(PIECE, len(text)))
        ended = not data
        text += decode(data, ended)
        try:
            while not closed:
                items, at, closed = _next(text, at, first)
                first = False
                yield from items
        except json.JSONDecodeError:
            if ended or len(text) - at > AT_ONCE:
                raise
        text, at = text[at:], 0
        if closed and (text := text.strip()):
            raise json.JSONDecodeError("Extra data after the list", text, 0)


def _next(text: str, at: int, first: bool) -> tuple[list[Any], int, bool]:
    """The item of a list that follows on `at` (or none, in an empty list), where it ends, and whether the list does.

    Raises:
        json.JSONDecodeError: the text is cut there, or broken.
    """
    at, opening = _skip(text, at), "[" if first else ","
    if text[at : at + 1] != opening:
        raise json.JSONDecodeError(f"Expecting '{opening}'", text, at)
    at = _skip(text, at + 1)
    if first and text[at : at + 1] == "]":
        return [], at + 1, True
    item, at = DECODER.raw_decode(text, at)
    at = _skip(text, at)
    if text[at : at + 1] not in (",", "]"):  # empty: a number may go on after it
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    closed = text[at] == "]"
    return [item], at + closed, closed


def _skip(text: str, at: int) -> int:
    """Where the white space at a place ends."""
    match = SPACE.match(text, at)
    return match.end() if match else at


@contextmanager
def _opened(source: Source) -> Iterator[tuple[Any, int]]:
    """The JSON text of a source, as a buffered binary file, and its size in bytes."""
    if source.member is None:
        with open(source.path, "rb") as file:
            yield file, source.path.stat().st_size
    else:
        with zipfile.ZipFile(source.path) as archive:
            info = archive.getinfo(source.member)
            check_ratio(source.path, info)
            with archive.open(info) as file:
                yield file, info.file_size


@contextmanager
def _readable(source: Source | Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not valid JSON ({error.msg}); is the download complete?") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{source}: not valid JSON ({error}); is the download complete?") from error
    except BROKEN_ZIP as error:
        raise DataError(f"{source}: cannot be read ({str(error)[:100]}); is the download complete?") from error


class Spool:
    """Texts by image id in a temporary file, which has no name: added in any order, read back in any order."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by its owner
        self.places: dict[int, tuple[int, int]] = {}
        self.end = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, image_id: int, text: str) -> None:
        data = text.encode()
        self.file.seek(self.end)
        self.file.write(data)
        self.places[image_id] = (self.end, len(data))
        self.end += len(data)

    def get(self, image_id: int) -> str:
        """The text of an image; empty where none was added."""
        start, length = self.places.get(image_id, (0, 0))
        self.file.seek(start)
        return self.file.read(length).decode()


class Draft:
    """An output in the making: entries {"image", "caption", "bbox"} of one image after the other, and their counts.

    `dropped` counts candidates, a phrase with its box, by the rule that dropped them.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.images = self.entries = self.boxes = 0
        self.dropped: Counter[str] = Counter()

    def add(self, image_id: int, entries: list[dict[str, Any]]) -> None:
        if entries:
            self.spool.add(image_id, ",\n".join(map(json.dumps, entries)))
            self.images += 1
            self.entries += len(entries)
            self.boxes += sum(len(entry["bbox"]) for entry in entries)

    def write(self, path: Path) -> None:
        """Write a JSON list, an entry a line, in the order of image ids."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write("[")
            for index, image_id in enumerate(sorted(self.spool.places)):
                file.write(",\n" if index else "\n")
                file.write(self.spool.get(image_id))
            file.write("\n]\n")
