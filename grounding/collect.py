"""All that a report says of a benchmark, as arrays: every checkpoint's result file read and judged once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dataset.expressions import Expression
from grounding import outcomes
from grounding.benchmarks import Benchmark
from grounding.outcomes import Source


class Results(NamedTuple):
    """A benchmark's n expressions, and what each checkpoint (source) makes of them. NaN where a map is lacking.

    Args:
        images: (n,) a number for each expression's image.
        splits: (n,) in the reader's terms.
        areas: (n,) the part of the image in its boxes, in 0..1.
        scores: by source (n, metrics of the benchmark), 1 or 0.
        best: the source that is best by the decisive metric.
        subject: the best one of the run that the report is about, whose cases are shown.
        baseline: the source that the subject is compared with, if there are several.
        shown: the sources that are shown in detail.
        measured, maps: of each shown source (n, `MEASURES`), and its maps (h, w).
    """

    benchmark: Benchmark
    expressions: Sequence[Expression]
    sources: Sequence[Source]
    images: np.ndarray
    splits: np.ndarray
    areas: np.ndarray
    scores: list[np.ndarray]
    best: int
    subject: int
    baseline: int | None
    shown: list[int]
    measured: dict[int, np.ndarray]
    maps: dict[int, list[Tensor | None]]

    @property
    def reported(self) -> np.ndarray:
        """(n,) whether an expression has a map, and a split that is reported."""
        return np.isin(self.splits, list(self.benchmark.splits)) & ~np.isnan(self.areas)

    def names(self, which: Sequence[int] | None = None) -> list[str]:
        """The names of the shown sources, or of others."""
        return [self.sources[index].name for index in (self.shown if which is None else which)]

    def metric(self, name: str, source: int) -> np.ndarray:
        """(n,) which expressions a source grounds right by one metric."""
        return self.scores[source][:, self.benchmark.metrics.index(name)]

    def measure(self, name: str, source: int) -> np.ndarray:
        """(n,) one of `MEASURES` of a shown source."""
        return self.measured[source][:, list(outcomes.MEASURES).index(name)]


def collect(
    benchmark: Benchmark, expressions: Sequence[Expression], sources: Sequence[Source], others: int = 0
) -> Results:
    """Read the result files one after the other; keeps the small maps of the sources that are shown.

    Args:
        expressions: all of the benchmark's, in the order of the result files.
        others: how many of the sources, the first ones, are of other runs than the one that the report is about. The
            best of them is the baseline; without any it is the first source, or the last where the first is the best.

    Raises:
        ReportError, ResultError: as `outcomes.read_maps`.
    """
    scores: list[np.ndarray] = []
    maps: dict[int, list[Tensor | None]] = {}
    for index, source in enumerate(sources):
        found = outcomes.read_maps(source, expressions)
        scores.append(outcomes.score(found, expressions, benchmark.metrics))
        if len(sources) <= outcomes.MOST_SHOWN:
            maps[index] = found
    splits = np.array([expression.split for expression in expressions])
    decisive = splits == next(iter(benchmark.splits))
    best = best_of(scores, decisive)
    subject = others + best_of(scores[others:], decisive)
    baseline = best_of(scores[:others], decisive) if others else (0 if subject else len(sources) - 1)
    shown = outcomes.shown(len(sources), [baseline, subject])
    has_map = np.any([~np.isnan(score).any(axis=1) for score in scores], axis=0)
    for index in shown:
        maps[index] = maps.get(index) or outcomes.read_maps(sources[index], expressions)
    return Results(
        benchmark=benchmark,
        expressions=expressions,
        sources=sources,
        images=np.unique([str(expression.image) for expression in expressions], return_inverse=True)[1],
        splits=splits,
        areas=outcomes.areas(expressions, has_map),
        scores=scores,
        best=best,
        subject=subject,
        baseline=baseline if baseline != subject else None,
        shown=shown,
        measured={index: outcomes.measure(maps[index], expressions) for index in shown},
        maps=maps,
    )


def best_of(scores: Sequence[np.ndarray], decisive: np.ndarray) -> int:
    """The first source with the highest accuracy by the last metric.

    Args:
        scores: by source (n, metrics).
        decisive: (n,) the expressions that decide.
    """
    accuracies = []
    for score in scores:
        values = score[decisive, -1]
        known = values[~np.isnan(values)]
        accuracies.append(float(known.mean()) if len(known) else 0.0)
    return int(np.argmax(accuracies))
