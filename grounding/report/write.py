"""The report of an evaluation: result files -> report.html and expressions.csv."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import utils
from dataset.expressions import Expression
from grounding.benchmarks import Benchmark
from grounding.pictures.panels import loss_figure
from grounding.pictures.render import data_uri, svg
from grounding.report import sections as parts
from grounding.report.rows import collect, named_apart
from grounding.report.sections import Block, Part
from grounding.results import Source, sources_of
from runs import EPOCHS_LOG, STEPS_LOG, RunError, read_runs


class ReportSection(NamedTuple):
    """A section of the page, and the table that it was made from (one row an expression), if there is one."""

    title: str
    intro: str
    parts: Sequence[Part]
    table: pd.DataFrame | None = None


def report_folders(benchmark: Benchmark, expressions: Sequence[Expression], folders: Sequence[Path]) -> Path:
    """Write report.html into the last of some --output_dir folders; it is compared with the others.

    Raises:
        ResultError: a folder has no complete results, or those of another benchmark.
    """
    output = folders[-1]
    before = {folder.resolve(): folder for folder in folders if folder.resolve() != output.resolve()}
    others = sources_of(list(before.values()), benchmark.own_metrics)
    sources = named_apart([*others, *sources_of([output], benchmark.own_metrics)])
    origins = [source.folder.origin(source.epoch) for source in sources]
    training = [Path(origin["checkpoint"]).parent for origin in origins if "checkpoint" in origin]
    path = output / "report.html"
    title = f"{benchmark.name}: {output.resolve().name}"
    write_report(path, title, [section(benchmark, expressions, sources, len(others))], training)
    return path


def write_report(path: Path, title: str, sections: Sequence[ReportSection], training: Sequence[Path]) -> None:
    """Write the page, and beside it expressions.csv.

    Args:
        sections: of `section`.
        training: folders of checkpoints; the losses of those that are training runs are drawn.
    """
    curves = training_section(training)
    utils.write_text(path.with_name("expressions.csv"), expressions_csv(sections))
    utils.write_text(path, render_page(title, [*sections, *([curves] if curves else [])]))


def section(
    benchmark: Benchmark, expressions: Sequence[Expression], sources: Sequence[Source], others: int = 0
) -> ReportSection:
    """A benchmark's part of the page; arguments and errors are those of `collect`."""
    found = collect(benchmark, expressions, sources, others)
    made = [parts.accuracies(found), parts.further_measures(found), parts.groups(found), parts.cases(found)]
    if found.baseline is not None:
        made.append(parts.comparison(found, found.baseline, found.subject))
    made.append(parts.origins(found))
    counts = ", ".join(f"{name} {(found.table['split'] == split).sum()}" for split, name in benchmark.splits.items())
    images = found.table["image"].nunique()
    intro = f"{len(expressions)} expressions of {images} images: {counts}."
    return ReportSection(benchmark.name, intro, made, found.table)


def training_section(folders: Sequence[Path]) -> ReportSection | None:
    """The losses of the training runs among the folders, each once; None where none is one."""
    runs = [path for path in dict.fromkeys(folders) if any((path / name).is_file() for name in (STEPS_LOG, EPOCHS_LOG))]
    try:
        rows, unit = read_runs(runs)
    except RunError as error:
        utils.log(f"the report is without training curves: {error}")
        return None
    if not rows:
        return None
    drawn = data_uri("image/svg+xml", svg(loss_figure(rows, unit, columns=3)))
    curves = Block(charts={f"Losses of {', '.join(rows)} by {unit}.": drawn})
    return ReportSection("Training", "From the logs beside the checkpoints.", [Part("Losses", "", [curves])])


def render_page(title: str, sections: Sequence[ReportSection]) -> str:
    """The page as HTML (report.html): one file without scripts or network.

    The template engine escapes every text: phrases, names and paths may hold anything.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = environment.keep_trailing_newline = True
    return environment.get_template("report.html").render(title=title, sections=sections)


# ---- expressions.csv


def expressions_csv(sections: Sequence[ReportSection]) -> str:
    """The tables of the sections, one under the other, as CSV: a row an expression, the benchmark's name first."""
    tables = {section.title: section.table for section in sections if section.table is not None}
    table = pd.concat(tables, names=["benchmark"])
    table.columns = [": ".join(filter(None, names)) for names in table.columns]
    table = table.reset_index("benchmark")
    table["category"] = table["category"].map("; ".join)
    texts = table.select_dtypes(exclude="number").columns
    table[texts] = table[texts].astype(object).map(no_formula)
    table = table.rename(columns=no_formula).round(6).convert_dtypes()  # whole numbers are written as such
    return table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def no_formula(text: str) -> str:
    """A text that no spreadsheet takes for a formula: one that begins like a formula gets an apostrophe before it.

    So does one that begins with an apostrophe: to undo this, remove a leading apostrophe.
    """
    return f"'{text}" if re.match("[=+\\-@\t\r\n'＝＋－＠]", text) else text
