"""What `prepare.py check` found: a table of files and their problems by kind, as text and as JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dataset.expressions import Problems, list_cases
from terminal import aligned
from utils import UserError

LEVELS = ("error", "warning")


@dataclass
class CheckedFile:
    """One file or folder and what was found in it."""

    file: str
    checked: str  # what was looked at
    named_by: str  # the config key that names it, and the config; "" for a config itself
    count: int | None = None  # its usable entries; None where nothing is counted
    errors: Problems = field(default_factory=Problems)  # of its entries
    failures: list[str] = field(default_factory=list)  # errors of the file as a whole
    notes: list[str] = field(default_factory=list)  # facts worth knowing, which may be intended

    @property
    def warnings(self) -> Problems:
        """Problems of its entries that training or evaluation would ignore."""
        return self.errors.warnings

    def found(self, level: str) -> list[tuple[str, list[str]]]:
        """Each kind of problem of a level with its cases; a failure of the whole file is a kind without a case."""
        if level == "warning":
            return list(self.warnings.kinds.items())
        return [*((failure, []) for failure in self.failures), *self.errors.kinds.items()]

    def total(self, level: str) -> int:
        return sum(len(cases) or 1 for _, cases in self.found(level))

    def fail(self, message: str) -> None:
        """Add an error of the file as a whole, with its name."""
        self.failures.append(message if message.startswith(self.file) else f"{self.file}: {message}")

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """End the block at a `UserError` and add it as a failure."""
        try:
            yield
        except UserError as error:
            self.fail(str(error))


class CheckReport:
    """The checked files, in the order in which the configs name them.

    Args:
        shown: how many cases of each kind of problem are listed.
    """

    def __init__(self, shown: int) -> None:
        self.shown = shown
        self.files: list[CheckedFile] = []

    def add(self, file: str, checked: str, named_by: str) -> CheckedFile:
        """Add a file, with nothing found yet."""
        self.files.append(CheckedFile(file, checked, named_by))
        return self.files[-1]

    def total(self, level: str) -> int:
        """The number of problems of a level in all files."""
        return sum(file.total(level) for file in self.files)

    def text(self) -> str:
        """The table, the problems and the notes, for people."""
        table: list[tuple[str, ...]] = [("file", "checked", "count", "errors", "warnings")]
        for file in self.files:
            count = "-" if file.count is None else f"{file.count:,}"
            totals = (f"{total:,}" if (total := file.total(level)) else "-" for level in LEVELS)
            table.append((file.file, file.checked, count, *totals))
        parts = [aligned(table, left=2)]
        for level in LEVELS:
            lines = [line for file in self.files for found in file.found(level) for line in self._lines(file, *found)]
            parts += ["\n  ".join([f"{level}s", *lines])] if lines else []
        if notes := [f"{file.file}: {note}" for file in self.files for note in file.notes]:
            parts.append("\n  ".join(["notes", *notes]))
        sums = {level: self.total(level) for level in LEVELS}
        counts = " and ".join(f"{f'{n:,}' if n else 'no'} {level}{'s' * (n != 1)}" for level, n in sums.items())
        where = "; docs/data.md says where each file comes from and what it must hold" if sums["error"] else ""
        return "\n\n".join([*parts, f"{counts} in {len(self.files)} files{where}"])

    def _lines(self, file: CheckedFile, kind: str, cases: list[str]) -> list[str]:
        """A kind of problem and its first cases, one a line; a failure with the key that names the file."""
        if cases:
            return list_cases(kind, cases, self.shown)
        return f"{kind}{f' [{file.named_by}]' if file.named_by else ''}".split("\n")

    def json(self) -> str:
        """The same as a JSON object: ok, errors, warnings, files, problems, notes."""
        content = {
            "ok": not self.total("error"),
            "errors": self.total("error"),
            "warnings": self.total("warning"),
            "files": [
                {"file": file.file, "checked": file.checked, "named_by": file.named_by, "count": file.count}
                | {"errors": file.total("error"), "warnings": file.total("warning")}
                for file in self.files
            ],
            "problems": [
                {"level": level, "file": file.file, "kind": kind, "count": len(cases) or 1}
                | {"first": cases[: self.shown]}
                for level in LEVELS
                for file in self.files
                for kind, cases in file.found(level)
            ],
            "notes": [{"file": file.file, "note": note} for file in self.files for note in file.notes],
        }
        return json.dumps(content, indent=2)
