"""Training entries as packed bytes: processes and loader workers share one file of them, and none holds objects.

As Python objects an entry takes over 1 kB in each process, and each worker that touches it copies it; packed, it takes
some 170 bytes once, and a few microseconds a look-up.
"""

import json
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, overload

import numpy as np
from torch.utils.data import Dataset

FORM = b"amc entries 1\n"  # how a packed file ends; another form gets another number
# Arrays behind the entries' bytes, one number an entry or (the last two) an image, by their types in `array`.
# ends: where an entry's bytes end; rows: its index in the JSON file; boxed: whether it has boxes; first: the first
# entry of an image; image_ends: where the image's name ends.
COLUMNS = {"ends": "q", "rows": "q", "boxed": "b", "first": "q", "image_ends": "q"}


class TrainingEntry(NamedTuple):
    """One training entry; `source` names its file and index in messages. Boxes are [x1, y1, x2, y2] in pixels."""

    image: Path
    captions: list[str]
    boxes: list[list[float]]
    source: str


class RawEntry(NamedTuple):
    """An entry as it is packed: `row` is its index in the JSON file, `image` the name there."""

    row: int
    image: str
    captions: list[str]
    boxes: list[list[float]]


def pack(entries: Iterable[RawEntry], out: IO[bytes]) -> None:
    """Write entries as they come; in memory are some bytes of each, and the names of the images."""
    columns = {name: array(kind) for name, kind in COLUMNS.items()}
    images: dict[str, int] = {}
    place = 0
    for number, entry in enumerate(entries):
        image = images.setdefault(entry.image, len(images))
        if image == len(columns["first"]):
            columns["first"].append(number)
        text = json.dumps([image, entry.captions, entry.boxes], separators=(",", ":"))
        place += out.write(text.encode())
        for name, value in (("ends", place), ("rows", entry.row), ("boxed", bool(entry.boxes))):
            columns[name].append(value)
    sizes = [place]
    named = 0
    for name in images:
        named += out.write(name.encode())
        columns["image_ends"].append(named)
    sizes.append(named)
    for column in columns.values():
        sizes.append(out.write(column.tobytes()))
    out.write(struct.pack(f"<{len(sizes)}q", *sizes) + FORM)


class PackedEntries(Dataset[TrainingEntry], Sequence[TrainingEntry]):
    """The entries of one training file.

    Args:
        content: uint8, what `pack` wrote; a mapped file is read where entries are looked up, and nowhere else.
        file: the JSON file, for `TrainingEntry.source`.
        image_root: what the images' names lie below.

    Raises:
        ValueError: it is something else.
    """

    def __init__(self, content: np.ndarray, file: str | Path, image_root: str) -> None:
        self.file, self.image_root = file, image_root
        count = 2 + len(COLUMNS)
        head = struct.calcsize(f"<{count}q")
        end = len(content) - len(FORM)
        if end < head or content[end:].tobytes() != FORM:
            raise ValueError("no packed entries")
        sizes = struct.unpack(f"<{count}q", content[end - head : end].tobytes())
        if min(sizes) < 0 or sum(sizes) != end - head:
            raise ValueError("packed entries of another size")
        self.content, self.names, *columns = np.split(content[: end - head], np.cumsum(sizes)[:-1])
        for (name, kind), column in zip(COLUMNS.items(), columns, strict=True):
            setattr(self, name, column.view(kind))

    ends: np.ndarray
    rows: np.ndarray
    boxed: np.ndarray
    first: np.ndarray
    image_ends: np.ndarray

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
        image, captions, boxes = json.loads(_piece(self.content, self.ends, index))
        name = self.image_name(image)
        return TrainingEntry(Path(self.image_root, name), captions, boxes, self.source(index, name))

    def image_name(self, image: int) -> str:
        return _piece(self.names, self.image_ends, image).decode()

    def source(self, index: int, name: str) -> str:
        return f"{self.file}: entry {self.rows[index]} ({name})"

    def images(self) -> Iterator[tuple[Path, str]]:
        """Each image once, with the source of its first entry."""
        for image, index in enumerate(self.first.tolist()):
            name = self.image_name(image)
            yield Path(self.image_root, name), self.source(index, name)


def _piece(content: np.ndarray, ends: np.ndarray, index: int) -> bytes:
    return content[ends[index - 1] if index else 0 : ends[index]].tobytes()
