"""What passes through the terminal: types of options, tables, and text that cannot give it orders."""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TextIO

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\r\t"}


def printable(text: str, stream: TextIO) -> str:
    """A text as a stream can show it: control characters, and those that its encoding lacks, become escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.translate(CONTROLS).encode(encoding, "backslashreplace").decode(encoding)


class Escaping:
    """A text stream whose `write` makes text `printable`: phrases and paths come from files, and terminals obey."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text, self.stream))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines of columns: the first `left` of a row flush left, the others right; rows may be short."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    padded = (
        [cell.ljust(widths[i]) if i < left else cell.rjust(widths[i]) for i, cell in enumerate(row)] for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def boolean(text: str) -> bool:
    """A true boolean for argparse: `--resume False` means False."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return known[text.lower()]


def integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    """An integer from low to high, for argparse."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            upper = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{upper}, not {value}")
        return value

    parse.__name__ = "integer"  # for argparse's message about what is no integer
    return parse


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value
