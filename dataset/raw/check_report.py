"""What `prepare.py check` found: a table of files and their problems by kind, as text and as JSON."""

import json

from dataset.expressions import DataFile, list_cases
from terminal import aligned

LEVELS = ("error", "warning")


class CheckReport:
    """The checked files, in the order in which the configs name them.

    Args:
        shown: how many cases of each kind of problem are listed.
    """

    def __init__(self, files: list[DataFile], shown: int) -> None:
        self.files = files
        self.shown = shown

    def total(self, level: str) -> int:
        """The number of problems of a level in all files."""
        return sum(total(file, level) for file in self.files)

    def text(self) -> str:
        """The table, the problems and the notes, for people."""
        table: list[tuple[str, ...]] = [("file", "checked", "count", "errors", "warnings")]
        for file in self.files:
            count = "-" if file.count is None else f"{file.count:,}"
            totals = (f"{number:,}" if (number := total(file, level)) else "-" for level in LEVELS)
            table.append((file.name, file.holds, count, *totals))
        parts = [aligned(table, left=2)]
        for level in LEVELS:
            lines = [line for file in self.files for one in found(file, level) for line in self._lines(file, *one)]
            parts += ["\n  ".join([f"{level}s", *lines])] if lines else []
        if notes := [f"{file.name}: {note}" for file in self.files for note in file.notes]:
            parts.append("\n  ".join(["notes", *notes]))
        sums = {level: self.total(level) for level in LEVELS}
        counts = " and ".join(f"{f'{n:,}' if n else 'no'} {level}{'s' * (n != 1)}" for level, n in sums.items())
        where = "; docs/data.md says where each file comes from and what it must hold" if sums["error"] else ""
        return "\n\n".join([*parts, f"{counts} in {len(self.files)} files{where}"])

    def _lines(self, file: DataFile, kind: str, cases: list[str]) -> list[str]:
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
                {"file": file.name, "checked": file.holds, "named_by": file.named_by, "count": file.count}
                | {"errors": total(file, "error"), "warnings": total(file, "warning")}
                for file in self.files
            ],
            "problems": [
                {"level": level, "file": file.name, "kind": kind, "count": len(cases) or 1}
                | {"first": cases[: self.shown]}
                for level in LEVELS
                for file in self.files
                for kind, cases in found(file, level)
            ],
            "notes": [{"file": file.name, "note": note} for file in self.files for note in file.notes],
        }
        return json.dumps(content, indent=2)


def found(file: DataFile, level: str) -> list[tuple[str, list[str]]]:
    """Each kind of problem of a level with its cases; a failure of the whole file is a kind without a case."""
    if level == "warning":
        return [*file.problems.warnings.kinds.items(), *file.remarks.kinds.items()]
    return [*((failure, []) for failure in file.failures), *file.problems.kinds.items()]


def total(file: DataFile, level: str) -> int:
    return sum(len(cases) or 1 for _, cases in found(file, level))
