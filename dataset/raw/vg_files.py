"""Visual Genome's files, unpacked or in the owners' .zip, read as a stream: one entry is in memory at a time.

They have up to 4 GB.
"""

import codecs
import json
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from dataset.raw.archives import BROKEN_ZIP, check_ratio, visible_members
from dataset.reading import DataError, json_items
from files import RepeatedKey

Row = dict[str, Any]
KINDS = ("image_data", "region_descriptions", "attributes", "objects")
NAME = re.compile(
    rf"({'|'.join(KINDS)})(?:_v\d[\d_.]*)?\.(?:json|json\.gz|json\.zip|zip)"
)  # objects_v1_2.json.zip, say


class RawFile(NamedTuple):
    """A JSON file, or the member of that name of a .zip file."""

    path: Path
    member: str | None = None

    @property
    def kind(self) -> str | None:
        """One of `KINDS`, by the name."""
        match = NAME.fullmatch(Path(self.member or self.path).name)
        return match and match[1]

    def __str__(self) -> str:
        return f"{self.path} ({self.member})" if self.member else str(self.path)


def find_sources(raw: Sequence[Path]) -> dict[str, RawFile]:
    """The owners' files in folders, or given by name, by their kind. A file is preferred to its .zip.

    Raises:
        DataError: a path does not exist or is not such a file, or two are of the same kind.
    """
    found: dict[str, RawFile] = {}
    for path in raw:
        if not path.exists():
            raise DataError(f"{path}: does not exist; give a folder with Visual Genome's files, or the files")
        files = [file for file in sorted(path.iterdir()) if RawFile(file).kind] if path.is_dir() else [path]
        names = {file.name for file in files}
        for file in files:
            if file.suffix == ".json" or names.isdisjoint((file.stem, f"{file.stem}.json")):
                for kind, source in _contents(file):
                    if kind in found:
                        raise DataError(f"{found[kind]} and {source} are both {kind}; give the one to use by its name")
                    found[kind] = source
    return found


def _contents(file: Path) -> list[tuple[str, RawFile]]:
    """The kind of a file, or those of the members of a .zip."""
    sources = [RawFile(file)]
    if file.suffix == ".zip":
        with _readable(file), zipfile.ZipFile(file) as archive:
            sources = [RawFile(file, info.filename) for info in visible_members(archive)]
    found = [(source.kind, source) for source in sources if source.kind]
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
            raise DataError(f"{source}: is compressed by gzip; unpack it first (gunzip)")
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            raise DataError(
                f"{source}: expected a JSON list, found an object; is it Visual Genome's file? If it holds an object a "
                "line, make a list of them: [...], with commas between"
            )
        with tqdm.wrapattr(file, "read", total=size, desc=source.path.name, disable=None) as stream:
            yield from json_items(stream)


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
    """Rows of each image in a temporary file: images are added in any order, and read back by their ids.

    For an output, these are its entries {"image", "caption", "bbox"}, and `dropped` counts the candidates, each a
    phrase with its box, by the rule that dropped them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.places: dict[int, int] = {}  # image id -> first byte
        self.entries = self.boxes = 0  # that `write` wrote
        self.dropped: Counter[str] = Counter()

    def add(self, image_id: int, rows: list[Any]) -> None:
        """Add all rows of an image; an image without any is not kept."""
        if rows:
            self.places[image_id] = self.file.seek(0, os.SEEK_END)
            pickle.dump(rows, self.file)

    def get(self, image_id: int) -> list[Any]:
        """The rows of an image; empty where none was added."""
        if image_id not in self.places:
            return []
        self.file.seek(self.places[image_id])
        return pickle.load(self.file)

    def write(self, path: Path) -> None:
        """Write the entries as a JSON list, one a line, in the order of image ids."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write("[")
            for entry in (entry for image_id in sorted(self.places) for entry in self.get(image_id)):
                file.write((",\n" if self.entries else "\n") + json.dumps(entry))
                self.entries += 1
                self.boxes += len(entry["bbox"])
            file.write("\n]\n")
