"""What `prepare.py check` found: one table of files, the first problems of each kind, and the same as JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from dataset.expressions import Cases, Problems
from terminal import aligned
from utils import UserError

Level = Literal["error", "warning"]
LEVELS: tuple[Level, ...] = ("error", "warning")


@dataclass
class Row:
    """One file or folder and what was found of it.

    Args:
        file: its path.
        checked: what was looked at in it.
        named_by: the config key that names it, and the config; "" for a config itself.
        errors: problems of its entries that training or evaluation would stop at, or that make its numbers wrong.
        warnings: problems of its entries that it would go on with.
        count: of what it holds, that could be read; None where nothing is counted.
        failures: errors of the file as a whole.
        notes: what is worth knowing, and may be meant so.
    """

    file: str
    checked: str
    named_by: str
    errors: Problems
    warnings: Problems
    count: int | None = None
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def total(self, level: Level) -> int:
        """How many problems of a level there are."""
        return sum(cases.count for _, cases in self.found(level))

    def found(self, level: Level) -> list[tuple[str, Cases]]:
        """The problems of a level by kind; a failure of the whole file is a kind without places."""
        if level == "warning":
            return list(self.warnings.kinds.items())
        return [*((failure, Cases(1)) for failure in self.failures), *self.errors.kinds.items()]

    def fail(self, message: str) -> None:
        """Note an error of the file as a whole, with its name."""
        self.failures.append(message if message.startswith(self.file) else f"{self.file}: {message}")

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Note the error that ends the block early, instead of passing it on."""
        try:
            yield
        except UserError as error:
            self.fail(str(error))


class Report:
    """All rows, in the order in which configs name the files.

    Args:
        shown: how many cases of each kind of problem are listed.
    """

    def __init__(self, shown: int) -> None:
        self.shown = shown
        self.rows: list[Row] = []

    def row(self, file: str, checked: str, named_by: str) -> Row:
        """A new row of the table."""
        errors = Problems(self.shown)
        self.rows.append(Row(file, checked, named_by, errors, errors.warnings))
        return self.rows[-1]

    def total(self, level: Level) -> int:
        """How many problems of a level there are in all."""
        return sum(row.total(level) for row in self.rows)

    def text(self) -> str:
        """The table, the problems and the notes, for people."""
        parts = [_table(self.rows)]
        for level in LEVELS:
            lines = [line for row in self.rows for kind, cases in row.found(level) for line in _lines(row, kind, cases)]
            if lines:
                parts.append("\n".join([f"{level}s", *(f"  {line}" for line in lines)]))
        if notes := [f"  {row.file}: {note}" for row in self.rows for note in row.notes]:
            parts.append("\n".join(["notes", *notes]))
        errors, warnings = self.total("error"), self.total("warning")
        parts.append(f"{_counted(errors, 'error')} and {_counted(warnings, 'warning')} in {len(self.rows)} files")
        if errors:
            parts[-1] += "; docs/data.md says where each file comes from and what it must hold"
        return "\n\n".join(parts)

    def json(self) -> str:
        """The same as a JSON object: ok, errors, warnings, files, problems, notes."""
        files: list[dict[str, Any]] = []
        problems: list[dict[str, Any]] = []
        for row in self.rows:
            counts = {"count": row.count, "errors": row.total("error"), "warnings": row.total("warning")}
            files.append({"file": row.file, "checked": row.checked, "named_by": row.named_by, **counts})
        for level in LEVELS:
            for row in self.rows:
                for kind, cases in row.found(level):
                    found = {"kind": kind, "count": cases.count, "first": cases.first}
                    problems.append({"level": level, "file": row.file, **found})
        content = {
            "ok": self.total("error") == 0,
            "errors": self.total("error"),
            "warnings": self.total("warning"),
            "files": files,
            "problems": problems,
            "notes": [{"file": row.file, "note": note} for row in self.rows for note in row.notes],
        }
        return json.dumps(content, indent=2)


def _table(rows: list[Row]) -> str:
    """Aligned columns; zero problems are a dash, so that the others catch the eye."""
    cells: list[tuple[str, ...]] = [("file", "checked", "count", "errors", "warnings")]
    for row in rows:
        count = "-" if row.count is None else f"{row.count:,}"
        totals = (row.total(level) for level in LEVELS)
        cells.append((row.file, row.checked, count, *(f"{n:,}" if n else "-" for n in totals)))
    return aligned(cells, left=2)


def _lines(row: Row, kind: str, cases: Cases) -> list[str]:
    """A kind of problem and its first cases, below each other; a failure with the key that names the file."""
    if not cases.first:
        return f"{kind}{f' [{row.named_by}]' if row.named_by else ''}".split("\n")
    return cases.lines(kind)


def _counted(number: int, noun: str) -> str:
    return f"{f'{number:,}' if number else 'no'} {noun}{'' if number == 1 else 's'}"
