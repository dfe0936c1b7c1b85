"""Training entries as packed bytes: processes and loader workers share one file of them, and none holds objects.

As Python objects an entry takes over 1 kB in each process, and each worker that touches it copies it; packed, it takes
some 170 bytes once, and a few microseconds a look-up.
"""

import json
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, overload

import numpy as np
from torch.utils.data import Dataset

from files import BLOCK

FORM = b"amc entries 3\n"  # how a packed file ends; another form gets another number
# Arrays behind the entries' bytes, one number an entry or (first) an image, by their types.
# ends: where an entry's bytes end; rows: its index in the JSON file; first: the first entry of an image; boxed: whether
# it has boxes; related: whether it has synonyms.
COLUMNS = {"ends": "<i8", "rows": "<i8", "first": "<i8", "boxed": "i1", "related": "i1"}
HEAD = struct.Struct(f"<{2 + len(COLUMNS)}q")  # before `FORM`: sizes of the entries and of each array, and a checksum
ENCODER = json.JSONEncoder(separators=(",", ":"))


class TrainingEntry(NamedTuple):
    """One training entry; `source` names its file and index in messages. Boxes are [x1, y1, x2, y2] in pixels.

    `relation`: words of the captions and, after them, their synonyms; empty if it has none.
    """

    image: Path
    captions: list[str]
    boxes: list[list[float]]
    source: str
    relation: Sequence[str] = ()


class RawEntry(NamedTuple):
    """An entry as it is packed: `row` is its index in the JSON file, `image` the name there."""

    row: int
    image: str
    captions: list[str]
    boxes: list[list[float]]
    relation: Sequence[str] = ()


def pack(entries: Iterable[RawEntry], out: IO[bytes]) -> None:
    """Write entries as they come; of each, 26 bytes stay in memory until all are written."""
    ends, rows, images, boxed, related = array("q"), array("q"), array("q"), array("b"), array("b")
    place = checksum = 0
    for entry in entries:
        content = ENCODER.encode(entry[1:]).encode()
        checksum = zlib.crc32(content, checksum)
        place += out.write(content)
        ends.append(place)
        rows.append(entry.row)
        images.append(hash(entry.image))  # of 64 bits, which tell millions of names apart
        boxed.append(bool(entry.boxes))
        related.append(bool(entry.relation))
    first = np.sort(np.unique(np.frombuffer(images, np.int64), return_index=True)[1])
    sizes = [place]
    for column, kind in zip((ends, rows, first, boxed, related), COLUMNS.values(), strict=True):
        content = np.asarray(column, kind).tobytes()
        checksum = zlib.crc32(content, checksum)
        sizes.append(out.write(content))
    out.write(HEAD.pack(*sizes, checksum) + FORM)


class PackedEntries(Dataset[TrainingEntry], Sequence[TrainingEntry]):
    """The entries of one training file.

    Args:
        packed: what `pack` wrote, as bytes or in a file. A file is mapped: it is read where entries are looked up.
        file: the JSON file, for `TrainingEntry.source`.
        image_root: what the images' names lie below.

    Raises:
        OSError, ValueError: it cannot be read, or is something else.
    """

    def __init__(self, packed: bytes | Path, file: str | Path, image_root: str) -> None:
        self.packed, self.file, self.image_root = packed, file, image_root
        # A plain array: what is cut from a `memmap` is one as well, and slow.
        content = (
            np.asarray(np.memmap(packed, np.uint8, "r")) if isinstance(packed, Path) else np.frombuffer(packed, "u1")
        )
        end = len(content) - len(FORM)
        if end < HEAD.size or content[end:].tobytes() != FORM:
            raise ValueError("no packed entries")
        *sizes, self.checksum = HEAD.unpack(content[end - HEAD.size : end].tobytes())
        if min(sizes) < 0 or sum(sizes) != end - HEAD.size:
            raise ValueError("packed entries of another size")
        self.content = content[: end - HEAD.size]
        self.entries, *columns = np.split(self.content, np.cumsum(sizes)[:-1])
        self.ends, self.rows, self.first, self.boxed, self.related = (
            column.view(kind) for kind, column in zip(COLUMNS.values(), columns, strict=True)
        )

    def __reduce__(self) -> Any:
        """Another process maps the file itself."""
        return PackedEntries, (self.packed, self.file, self.image_root)

    def verify(self) -> None:
        """Raise `ValueError` if a byte is not as it was written; reads all of them."""
        checksum = 0
        for start in range(0, len(self.content), BLOCK):
            checksum = zlib.crc32(self.content[start : start + BLOCK].data, checksum)
        if checksum != self.checksum:
            raise ValueError("damaged packed entries")

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> TrainingEntry: ...

    @overload
    def __getitem__(self, index: slice) -> list[TrainingEntry]: ...

    def __getitem__(self, index: int | slice) -> TrainingEntry | list[TrainingEntry]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones, and `IndexError`
        name, captions, boxes, *more = json.loads(self._text(index))
        return TrainingEntry(Path(self.image_root, name), captions, boxes, self._source(index, name), *more)

    def images(self) -> Iterator[tuple[Path, str]]:
        """Each image once, with the source of its first entry."""
        for index in map(int, self.first):
            name = json.loads(self._text(index))[0]
            yield Path(self.image_root, name), self._source(index, name)

    def _text(self, index: int) -> bytes:
        return self.entries[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()

    def _source(self, index: int, name: str) -> str:
        return f"{self.file}: entry {self.rows[index]} ({name})"
