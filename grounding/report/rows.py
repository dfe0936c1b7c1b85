"""Result files read back: whether and how well each stored map grounds its expression, as a report's arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

import utils
from dataset.expressions import Expression
from grounding import maps
from grounding.benchmarks import Benchmark
from grounding.maps import ResizedMap
from grounding.metrics import overlaps, score
from grounding.results import Source
from runs import shortest_ends

THRESHOLDS = (0.3, 0.5, 0.7, 0.9)  # of a map's maximum
MOST_SHOWN = 4  # checkpoints that a report shows in detail
MEASURES = {  # what `measure` gives -> how the report calls it
    "energy": "share of the map's energy inside",
    "lift": "the same, above chance",
    **{f"hot {threshold}": f"pointing at {threshold:g} of the maximum" for threshold in THRESHOLDS},
    **{f"map box {threshold}": f"box from the map at {threshold:g}, IoU 0.5" for threshold in THRESHOLDS},
}


class ReportError(utils.UserError):
    """Results that a report cannot be made of."""


def read_maps(source: Source, expressions: Sequence[Expression]) -> list[Tensor | None]:
    """The map (h, w) of each expression; None where its image could not be read when it was evaluated.

    Raises:
        ReportError: the result file is missing or cannot be read.
        ResultError: it is of other expressions.
    """
    stored = source.folder.read(source.epoch, [expression.ref_id for expression in expressions])
    if stored is None:
        raise ReportError(
            f"{source.folder.path(source.epoch)}: no result to report; evaluate that checkpoint first (again)"
        )
    records, left_out = iter(stored[0]), set(stored[1])
    return [None if position in left_out else next(records)["pred"] for position in range(len(expressions))]


def areas(expressions: Sequence[Expression], known: np.ndarray) -> np.ndarray:
    """The part of its image that each expression's boxes cover, (n,) in 0..1: the accuracy of a random point.

    Args:
        known: (n,) whether the image could be read; NaN where not.
    """
    found = [
        maps.inside(item.boxes, *item.size).mean() if readable else np.nan
        for item, readable in zip(expressions, known.tolist(), strict=True)
    ]
    return np.array(found)


def measure(maps: Sequence[Tensor | None], expressions: Sequence[Expression]) -> np.ndarray:
    """The further measures: (n, len(MEASURES)) in the order of `MEASURES`, NaN without a map. One map at a time."""
    found = np.full((len(expressions), len(MEASURES)), np.nan)
    for row, pred, expression in zip(found, maps, expressions, strict=True):
        if pred is not None:
            row[:] = _measure(ResizedMap(pred, *expression.size), expression.boxes)
    return found


def _measure(resized: ResizedMap, boxes: np.ndarray) -> list[float]:
    cam = resized.product().numpy()
    mask = maps.inside(boxes, *cam.shape)
    energy = maps.energy_inside(cam, mask)
    regions = [maps.hot(cam, threshold) for threshold in THRESHOLDS]
    drawn = [maps.map_box(resized, region) for region in regions]
    return [
        energy,
        maps.above_chance(energy, float(mask.mean())),
        *(maps.hot_inside(region, mask) for region in regions),
        *(float(box is not None and overlaps(box, boxes)) for box in drawn),
    ]


# ---- which results a report is about


def named_apart(sources: Sequence[Source]) -> list[Source]:
    """The sources, those that are called alike by as much of folder and epoch as tells them apart instead."""
    names = [source.name for source in sources]
    alike = [source for source in sources if names.count(source.name) > 1]
    paths = [source.folder.folder.parent / f"epoch {source.epoch}" for source in alike]
    ends = iter(shortest_ends(paths))
    return [source._replace(name=next(ends)) if source in alike else source for source in sources]


def shown(count: int, compared: Sequence[int]) -> list[int]:
    """The results that are shown in detail: all if few, else the two that are compared and the last."""
    return list(range(count)) if count <= MOST_SHOWN else sorted({*compared, count - 1})


# ---- all that a report says of a benchmark


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
        return self.measured[source][:, list(MEASURES).index(name)]


def collect(
    benchmark: Benchmark, expressions: Sequence[Expression], sources: Sequence[Source], others: int = 0
) -> Results:
    """Read the result files one after the other; keeps the small maps of the sources that are shown.

    Args:
        expressions: all of the benchmark's, in the order of the result files.
        others: how many of the sources, the first ones, are of other runs than the one that the report is about. The
            best of them is the baseline; without any it is the first source, or the last where the first is the best.

    Raises:
        ReportError, ResultError: as `read_maps`.
    """
    scores: list[np.ndarray] = []
    maps: dict[int, list[Tensor | None]] = {}
    for index, source in enumerate(sources):
        found = read_maps(source, expressions)
        scores.append(score(found, expressions, benchmark.metrics))
        if len(sources) <= MOST_SHOWN:
            maps[index] = found
    splits = np.array([expression.split for expression in expressions])
    decisive = splits == next(iter(benchmark.splits))
    best = best_of(scores, decisive)
    subject = others + best_of(scores[others:], decisive)
    baseline = best_of(scores[:others], decisive) if others else (0 if subject else len(sources) - 1)
    in_detail = shown(len(sources), [baseline, subject])
    has_map = np.any([~np.isnan(values).any(axis=1) for values in scores], axis=0)
    for index in in_detail:
        maps[index] = maps.get(index) or read_maps(sources[index], expressions)
    return Results(
        benchmark=benchmark,
        expressions=expressions,
        sources=sources,
        images=np.unique([str(expression.image) for expression in expressions], return_inverse=True)[1],
        splits=splits,
        areas=areas(expressions, has_map),
        scores=scores,
        best=best,
        subject=subject,
        baseline=baseline if baseline != subject else None,
        shown=in_detail,
        measured={index: measure(maps[index], expressions) for index in in_detail},
        maps=maps,
    )


def best_of(scores: Sequence[np.ndarray], decisive: np.ndarray) -> int:
    """The first source with the highest accuracy by the last metric.

    Args:
        scores: by source (n, metrics).
        decisive: (n,) the expressions that decide.
    """
    accuracies = []
    for columns in scores:
        values = columns[decisive, -1]
        known = values[~np.isnan(values)]
        accuracies.append(float(known.mean()) if len(known) else 0.0)
    return int(np.argmax(accuracies))
