"""The report of an evaluation: result files -> parts -> one HTML page (grounding/report/page.py)."""

from collections.abc import Sequence
from pathlib import Path

import utils
from dataset.expressions import Expression
from grounding.benchmarks import Benchmark
from grounding.pictures.panels import loss_figure
from grounding.report import sections as parts
from grounding.report.charts import svg_uri
from grounding.report.page import Chart, Part, Section, render
from grounding.report.rows import Results, collect, named_apart
from grounding.results import Source, sources_of
from runs import EPOCHS_LOG, STEPS_LOG, RunError, read_runs


def report_folders(benchmark: Benchmark, expressions: Sequence[Expression], folders: Sequence[Path]) -> Path:
    """Write report.html into the last of some --output_dir folders; the ones before are what it is compared with.

    Raises:
        ResultError: a folder has no complete results, or those of another benchmark.
    """
    *before, output = folders
    others = sources_of(before, len(benchmark.metrics))
    sources = named_apart([*others, *sources_of([output], len(benchmark.metrics))])
    path = output / "report.html"
    title = f"{benchmark.name}: {output.resolve().name}"
    write_report(path, title, [section(benchmark, expressions, sources, len(others))], checkpoint_folders(sources))
    return path


def checkpoint_folders(sources: Sequence[Source]) -> list[Path]:
    """Where the checkpoints lie, as far as that is known."""
    origins = [source.folder.origin(source.epoch) for source in sources]
    return [Path(origin["checkpoint"]).parent for origin in origins if "checkpoint" in origin]


def write_report(path: Path, title: str, sections: Sequence[Section], training: Sequence[Path]) -> None:
    """Write the page.

    Args:
        sections: of `section`.
        training: the folders of the checkpoints; the losses of those that are of training runs are drawn.
    """
    curves = training_section(training)
    utils.write_text(path, render(title, [*sections, *([curves] if curves else [])]))


def section(
    benchmark: Benchmark,
    expressions: Sequence[Expression],
    sources: Sequence[Source],
    others: int = 0,
) -> Section:
    """A benchmark's part of the page; arguments and errors are those of `collect`."""
    found = collect(benchmark, expressions, sources, others)
    made = [parts.accuracy(found), parts.further_measures(found), parts.groups(found), parts.cases(found)]
    if found.baseline is not None:
        made.append(parts.comparison(found, found.baseline, found.subject))
    made.append(parts.origins(found))
    return Section(benchmark.name, introduction(found), made)


def introduction(found: Results) -> str:
    """How much was evaluated, by split."""
    names = found.benchmark.splits
    counts = ", ".join(f"{name} {int((found.splits == split).sum())}" for split, name in names.items())
    images = int(found.images.max()) + 1
    return f"{len(found.expressions)} expressions of {images} images: {counts}."


def training_section(folders: Sequence[Path]) -> Section | None:
    """The losses of the training runs among the folders, each once; None where none is one."""
    runs = [path for path in dict.fromkeys(folders) if any((path / name).is_file() for name in (STEPS_LOG, EPOCHS_LOG))]
    try:
        rows, unit = read_runs(runs)
    except RunError as error:
        utils.log(f"the report is without training curves: {error}")
        return None
    if not rows:
        return None
    figure = Chart(f"Losses of {', '.join(rows)} by {unit}.", svg_uri(loss_figure(rows, unit, columns=3)))
    return Section("Training", "From the logs beside the checkpoints.", [Part("Losses", "", [figure])])
