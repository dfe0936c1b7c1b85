"""What the report's page shows, and its HTML (report.html): one file without scripts or network.

The template engine escapes every text: phrases, names and paths may hold anything.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined


class Chart(NamedTuple):
    """A chart as a data URI; `title` describes it to those who cannot see it."""

    title: str
    uri: str


class Shot(NamedTuple):
    """One picture of a case, and whether the model's point is right; None for the image alone."""

    name: str
    uri: str
    right: bool | None


class ShownCase(NamedTuple):
    """An expression with its pictures."""

    text: str
    note: str
    shots: Sequence[Shot]


class Block(NamedTuple):
    """A table with charts beside it, or a chart, or cases.

    Args:
        table: of texts, counts and `Interval`s; its index holds the names of the rows.
        bold: the row whose intervals are bold.
        signed: whether intervals above 0 have a "+".
        folded: whether the table is hidden until the reader opens it.
    """

    title: str = ""
    note: str = ""
    table: pd.DataFrame | None = None
    charts: Sequence[Chart] = ()
    cases: Sequence[ShownCase] = ()
    bold: str | None = None
    signed: bool = False
    folded: bool = False


class Part(NamedTuple):
    """A part of a section, under a heading with a note."""

    title: str
    note: str
    blocks: Sequence[Block]


class ReportSection(NamedTuple):
    """A section of the page, and the table that it was made from (one row an expression), if there is one."""

    title: str
    intro: str
    parts: Sequence[Part]
    table: pd.DataFrame | None = None


def render_page(title: str, sections: Sequence[ReportSection]) -> str:
    """The page as HTML."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = environment.keep_trailing_newline = True
    return environment.get_template("report.html").render(title=title, sections=sections)
