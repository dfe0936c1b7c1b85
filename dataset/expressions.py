"""The common form of a benchmark's items: an image, an expression, its boxes; and what all readers of files share.

Boxes are [x, y, w, h] in pixels of the original image everywhere in evaluation, in float64: REFER's own form, whose
width must not be recovered from x + w (it rounds), while Flickr30k's integer corners lose nothing in x2 - x1.
"""

import contextlib
import functools
import os
import reprlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np

from dataset.reading import DataError, image_size, load_json
from dataset.text import clean_caption, has_content
from utils import UserError, log

Key = TypeVar("Key")
Value = TypeVar("Value")

SHOWN_PROBLEMS = 5  # of each kind
SURROGATE = "holds half of a surrogate pair, which is no character; correct the entry"
SHORT = reprlib.Repr()  # ends soon, however large or nested the value is
SHORT.maxlist = SHORT.maxdict = SHORT.maxtuple = SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


@dataclass(frozen=True, eq=False)
class Expression:
    """One item of a benchmark.

    Args:
        image: path of the image file; it exists.
        text: the cleaned expression; nothing may be left of it (`dataset.text.has_content`).
        ref_id: REFER's ref_id, or the index of the phrase in Flickr30k's evaluation order.
        split: the split it counts for, in the reader's terms ("val", "testA", "test", ...).
        boxes: (n, 4) float64 [x, y, w, h], n >= 1; any of them is right.
        record: what a result file holds beside ref_id and pred.
        detections: (k, 4) float64 [x, y, w, h] of a detector in this image; None where the benchmark has none.
        annotated_size: (height, width) that the boxes refer to, where the annotations decide that (Flickr30k).
        categories: what the annotations say it refers to: REFER's category, Flickr30k's phrase types; may be none.
        region: the pixels it refers to (`dataset.segmentation.RLE`), with one at least; None where no metric asks.
    """

    image: Path
    text: str
    ref_id: int
    split: str
    boxes: np.ndarray
    record: dict[str, Any] = field(default_factory=dict)
    detections: np.ndarray | None = None
    annotated_size: tuple[int, int] | None = None
    categories: tuple[str, ...] = ()
    region: dict[str, Any] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the boxes refer to, and that its map is resized to.

        It is the annotated size, or else the image file's own, read from its header.

        Raises:
            DataError: the image file is missing or has no readable header.
        """
        return self.annotated_size or _file_size(self.image)


def with_merged_boxes(expression: Expression) -> Expression:
    """The expression with the smallest box around its boxes; one with a single box stays as it is."""
    if len(expression.boxes) == 1:
        return expression
    corner = expression.boxes[:, :2].min(axis=0)
    size = (expression.boxes[:, :2] + expression.boxes[:, 2:]).max(axis=0) - corner
    return replace(expression, boxes=np.concatenate([corner, size])[None])


_file_size = functools.lru_cache(maxsize=1 << 16)(image_size)  # expressions share images, and models share expressions


class EntryProblem(Exception):
    """One entry that cannot be used: the kind of problem with its remedy, and what the entry holds."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


class Problems:
    """Problems gathered over all entries, so that one message shows every kind instead of the first case.

    As a context manager, it ends with `check`.

    Attributes:
        kinds: each kind of problem with where it was found.
        warnings: what is odd about entries that can be used.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, list[str]] = {}

    @functools.cached_property
    def warnings(self) -> "Problems":
        return Problems()

    def add(self, where: str, kind: str, detail: str = "") -> None:
        self.kinds.setdefault(kind, []).append(where + (f" ({detail})" if detail else ""))

    def at(self, where: str) -> "Place":
        """A context manager that ends its block at an `EntryProblem` and notes it."""
        return Place(self, where)

    def paragraphs(self) -> list[str]:
        """A paragraph a kind, with its count and its first cases."""
        return ["\n".join(list_cases(kind, cases, SHOWN_PROBLEMS)) for kind, cases in self.kinds.items()]

    def check(self) -> None:
        """Raise `DataError` with all `paragraphs`, if there are any; log the `warnings` if not."""
        if paragraphs := self.paragraphs():
            raise DataError("\n".join(paragraphs))
        for paragraph in self.warnings.paragraphs():
            log(f"warning: {paragraph}")

    def __enter__(self) -> "Problems":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.check()


class Place:
    """Where an entry stands; see `Problems.at`. A class, since a generator takes twice as long, millions of times."""

    def __init__(self, problems: Problems, where: str) -> None:
        self.problems = problems
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, EntryProblem):
            self.problems.add(self.where, error.kind, error.detail)
            return True
        return False


class Claim(NamedTuple):
    """What the entry at `where` says of an image: that it is there, and one of the others, or none.

    Args:
        text: what is asked, or said, of the image.
        boxes: (n, 4) float64 [x, y, w, h]; they should lie in the image.
        size: (height, width), of which the boxes are pixels; without boxes, what the image file should have.
    """

    where: str
    image: Path
    text: str | None = None
    boxes: np.ndarray | None = None
    size: tuple[int, int] | None = None


@dataclass
class DataFile:
    """A file or folder that a config names, and what was found in it.

    Args:
        holds: what is read of it.
        named_by: the config's key, and the config; "" for a config itself.
        problems: of its entries.
        remarks: of its entries, too odd for `prepare.py check` to pass over; training and evaluation do.
        count: its usable entries; None where nothing is counted.
        claims: what its entries say of images.
        failures: errors of the file as a whole.
        notes: facts worth knowing, which may be intended.
    """

    name: str
    holds: str
    named_by: str
    problems: Problems = field(default_factory=Problems)
    remarks: Problems = field(default_factory=Problems)
    count: int | None = None
    claims: list[Claim] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def says(self, where: str, image: Path, **what: Any) -> None:
        """Add a `Claim`."""
        self.claims.append(Claim(where, image, **what))

    def clean(self, where: str, text: str, max_words: int) -> str:
        """`clean_caption`; warns when nothing is left of a text, which stays as in the release: [CLS] alone."""
        cleaned = clean_caption(text, max_words)
        if not has_content(cleaned):
            kind = f"{self.name}: nothing is left of a text once cleaned; it stays, and the model reads [CLS] alone"
            self.problems.warnings.add(where, kind, shown(text))
        return cleaned

    def fail(self, message: str) -> None:
        """Add an error of the file as a whole, with its name."""
        self.failures.append(message if message.startswith(self.name) else f"{self.name}: {message}")


class Reading:
    """Reads the files that a config names, in one of two ways.

    For evaluation (`load`), it stops at a file that cannot be read, and in the end at all problems of entries together.
    For `prepare.py check` it goes on with the other files, and keeps the problems of each apart.

    Args:
        goes_on: read as check does.

    Attributes:
        config: the path of the config that names the files.
        files: all files in the order of reading.
        problems: those of all files, unless it goes on.
    """

    def __init__(self, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self.config = ""
        self.files: list[DataFile] = []
        self.problems = Problems()
        self._done: dict[Hashable, Any] = {}

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.problems.check()
            for note in (note for file in self.files for note in file.notes):
                log(f"warning: {note}")

    def once(self, read: Callable[..., Value], *what: Hashable) -> Value:
        """`read(self, *what)`, or what it returned when it was asked for before, say by another config."""
        key = (read, *what)
        if key not in self._done:
            self._done[key] = read(self, *what)
        return self._done[key]

    @contextlib.contextmanager
    def file(self, name: str | Path, holds: str, key: str = "") -> Iterator[DataFile]:
        """Read a file in the block. A `UserError` ends the block; whoever goes on finds it among the `failures`."""
        problems = Problems() if self.goes_on else self.problems
        file = DataFile(str(name), holds, f"{key} of {self.config}" if key else "", problems)
        self.files.append(file)
        try:
            yield file
        except UserError as error:
            if not self.goes_on:
                raise
            file.fail(str(error))

    def entries(
        self,
        name: str,
        holds: str,
        key: str,
        parse: Callable[[DataFile, str, Any], list[Value]],
        rows: Callable[[DataFile], Iterable[tuple[str, Any]]] | None = None,
    ) -> list[Value]:
        """What `parse(file, where, entry)` makes of each entry of a file; those with an `EntryProblem` are noted.

        Args:
            rows: yields the entries, each with where it stands; by default, those of a JSON list.
        """
        found = []
        with self.file(name, holds, key) as file:
            for where, row in (rows or list_rows)(file):
                with file.problems.at(where):
                    found += parse(file, where, row)
            file.count = sum(claim.text is not None for claim in file.claims)
            if not file.count and not file.problems.kinds:
                file.fail("holds no entries")
        return found


def list_rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    """The entries of a JSON list, each with where it stands."""
    for index, row in enumerate(load_json(file.name, list)):
        yield f"{file.name}: entry {index}", row


def load(read: Callable[[Reading], list[Value]], skip_missing: bool = False) -> list[Value]:
    """What `read` finds, once neither the files nor their entries nor the images have a problem.

    Args:
        skip_missing: do not look whether the images are there.

    Raises:
        DataError: a file that cannot be used, no items; or all problems of the entries in one message.
    """
    with Reading() as reading:
        found = read(reading)
        if not skip_missing:
            claims = (claim for file in reading.files for claim in file.claims)
            check_images(((claim.image, claim.where) for claim in claims), reading.problems)
    if not found:
        raise DataError("\n".join(failure for file in reading.files for failure in file.failures) or "no items")
    return found


def list_cases(kind: str, cases: list[str], most: int) -> list[str]:
    """A kind of problem with the number of its cases, and below it the first of them."""
    lines = [f"{kind} - {len(cases):,} found:", *(f"  {case}" for case in cases[:most])]
    return lines + ([f"  and {len(cases) - most:,} more"] if len(cases) > most else [])


def require(row: Any, key: str, *kinds: type) -> Any:
    """`row[key]`, of exactly one of the JSON types `kinds` (a boolean is no integer); raises `EntryProblem` otherwise.

    Integers have 64 bits, and texts no lone surrogates, which cannot be written or tokenised.
    """
    if not isinstance(row, dict):
        raise EntryProblem("an entry must be an object {key: value}", f"found a {type(row).__name__}")
    if key not in row:
        raise EntryProblem(f"key '{key}' is missing")
    value = row[key]
    if type(value) not in kinds or (type(value) is int and abs(value) >= 2**63):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise EntryProblem(f"key '{key}' must be of type {names}", f"found {shown(value)}")
    if type(value) is str and not is_text(value):
        raise EntryProblem(f"key '{key}' {SURROGATE}", shown(value))
    return value


def is_text(value: Any) -> TypeGuard[str]:
    r"""Whether a value is a text that can be written: JSON's \ud800 alone is half a character, a lone surrogate."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def shown(value: Any) -> str:
    """A value as Python writes it, cut to what a message can hold."""
    try:
        return SHORT.repr(value)[:60]
    except ValueError:
        return "an integer of thousands of digits"


def parse_boxes(value: Any, what: str) -> np.ndarray:
    """A list of boxes, each four finite numbers or more (a detection's score follows), as float64 (n, 4).

    Raises:
        EntryProblem: it is something else; `what` says what should have been there.
    """
    if not isinstance(value, list) or not all(is_box(box, more=True) for box in value):
        raise EntryProblem(f"{what} must be a list of boxes, each four finite numbers", f"found {shown(value)}")
    return np.array([box[:4] for box in value], dtype=np.float64).reshape(-1, 4)


def is_box(value: Any, more: bool = False) -> bool:
    """Whether a JSON value is four finite numbers; `more`: a detection's score may follow them."""
    if not isinstance(value, list) or len(value) < 4 or (len(value) > 4 and not more):
        return False
    return all(map(is_number, value[:4]))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number, that counts pixels: below 2^53; a boolean is none."""
    return type(value) in (int, float) and abs(value) < 2**53


def first_of(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, Value]:
    """The first value of each key, in order."""
    first: dict[Key, Value] = {}
    for key, value in pairs:
        first.setdefault(key, value)
    return first


def locate(image_root: str, name: str) -> Path:
    """Where an image of a data set lies: `name` below image_root, or where image_root is empty, anywhere.

    Raises:
        EntryProblem: the name is absolute, or leads out of image_root.
    """
    path = Path(name)
    if image_root and path.anchor:
        kind = "the image's path is absolute, so that image_root is not used; set image_root to '' or make it relative"
        raise EntryProblem(kind, f"found {name!r:.200}")
    if image_root and ".." in path.parts:
        kind = "the image's path leads out of image_root by '..'; correct it, or set image_root to ''"
        raise EntryProblem(kind, f"found {name!r:.200}")
    return Path(image_root, path)


def check_images(images: Iterable[tuple[Path, str]], problems: Problems) -> None:
    """Note each image file that does not exist, at the first entry that names it; looks once per image."""
    for image, where in first_of(images).items():
        if not os.path.isfile(image):  # False, too, for a name that the system finds too long
            kind = "the image file does not exist; check image_root and the entry, or pass --skip_broken"
            problems.add(where, kind, str(image))
