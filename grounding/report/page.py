"""What a report's page is made of, and its HTML (grounding/report/report.html): one file, without scripts or network.

Every text is escaped by the template engine: phrases, names and paths may hold anything.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined


class Cell(NamedTuple):
    """A table's cell: a value, smaller words under it, whether it stands out."""

    text: str
    detail: str = ""
    strong: bool = False


class Chart(NamedTuple):
    """A picture as a data URI; `title` says what it shows to those who do not see it."""

    title: str
    uri: str
    kind: Literal["chart"] = "chart"


class Table(NamedTuple):
    """Rows of cells, the first of each row its name.

    Args:
        charts: what stands beside it.
        folded: whether it is hidden until it is asked for.
    """

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    charts: Sequence[Chart] = ()
    folded: bool = False
    kind: Literal["table"] = "table"


class Shot(NamedTuple):
    """One picture of a case, and whether that model is right: True, False, or None for the image alone."""

    name: str
    uri: str
    right: bool | None


class Case(NamedTuple):
    """An expression with its pictures."""

    text: str
    note: str
    shots: Sequence[Shot]


class Sheet(NamedTuple):
    """Cases that have something in common."""

    title: str
    note: str
    cases: Sequence[Case]
    kind: Literal["sheet"] = "sheet"


Block = Table | Chart | Sheet


class Part(NamedTuple):
    """A headed part of a section, with a note on all of it."""

    title: str
    note: str
    blocks: Sequence[Block]


class Section(NamedTuple):
    """A benchmark's part of the page."""

    title: str
    intro: str
    parts: Sequence[Part]


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html").render(title=title, sections=sections)
