"""The report's table, from result files: one row an expression, one column a checkpoint and metric."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

import utils
from dataset.expressions import Expression
from grounding.benchmarks import Benchmark
from grounding.maps import ResizedMap, hot, inside, share_inside
from grounding.metrics import map_box_correct, score, settle, weight_of
from grounding.report.statistics import Interval, intervals
from grounding.results import Source
from runs import shortest_ends

MOST_SHOWN = 4  # checkpoints that a report shows in detail
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)  # of a map's maximum
# The measures of `measure_map`: name in the table -> title on the page. Names have a space, which no metric's name has.
POINTING = {f"pointing at {threshold:g}": f"pointing at {threshold:g} of the maximum" for threshold in THRESHOLDS}
MAP_BOX = {f"map box at {threshold:g}": f"box from the map at {threshold:g}, IoU 0.5" for threshold in THRESHOLDS}
MEASURES = {
    "energy inside": "share of the map's energy inside",
    "energy above chance": "the same, above chance",
    **POINTING,
    **MAP_BOX,
}


class ReportError(utils.UserError):
    """Results that a report cannot be made of."""


def named_apart(sources: Sequence[Source]) -> list[Source]:
    """The sources; equal names are replaced by as much of folder and epoch as tells them apart."""
    names = [source.name for source in sources]
    alike = [source for source in sources if names.count(source.name) > 1]
    paths = [source.folder.folder.parent / f"epoch {source.epoch}" for source in alike]
    ends = iter(shortest_ends(paths))
    return [source._replace(name=next(ends)) if source in alike else source for source in sources]


def read_maps(source: Source, expressions: Sequence[Expression]) -> list[Tensor | None]:
    """The map (h, w) of each expression; None where its image could not be read when it was evaluated.

    Raises:
        ReportError: the result file is missing or cannot be read.
        ResultError: it is of other expressions.
    """
    found = source.folder.read(source.epoch, expressions)
    if found is None:
        path = source.folder.path(source.epoch)
        raise ReportError(f"{path}: no result to report; evaluate that checkpoint first (again)")
    return found


class Results(NamedTuple):
    """What the report of a benchmark is made of; checkpoints go by the names of their sources.

    Args:
        table: one row an expression, in the order of the result files. Columns of `facts_of`; and for each metric a
            column a checkpoint, for each of `MEASURES` a column a shown checkpoint: `table["point"]` has a column a
            checkpoint, `table["point", "AMC"]` is one of them. NaN where there is no map. A metric whose means are
            weighted, say M, has its weights in `table["M weight"]`.
        maps: shown checkpoint -> the map (h, w) of each expression.
        best: the checkpoint with the highest accuracy by the last metric on the first split, as everywhere here.
        subject: the best of the run that the report is about; its cases are shown.
        baseline: what the subject is compared with, if there are several checkpoints.
    """

    benchmark: Benchmark
    expressions: Sequence[Expression]
    sources: Sequence[Source]
    table: pd.DataFrame
    maps: dict[str, list[Tensor | None]]
    best: str
    subject: str
    baseline: str | None

    @property
    def shown(self) -> list[str]:
        """The checkpoints that are shown in detail."""
        return list(self.maps)

    @property
    def reported(self) -> pd.Series:
        """(n,) bool: the expression has a map, and its split is reported."""
        return self.table["split"].isin(self.benchmark.splits) & self.table["area of boxes"].notna()

    def intervals(
        self, columns: pd.DataFrame, rows: pd.Series | pd.Index, weights: pd.DataFrame | None = None
    ) -> list[Interval]:
        """The mean of each column over some rows, weighted or plain, with its interval."""
        of = None if weights is None else weights.loc[rows].to_numpy()
        return intervals(columns.loc[rows].to_numpy(), self.table["image"].cat.codes[rows].to_numpy(), of)

    def is_weighted(self, metric: str) -> bool:
        """Whether the metric of some expressions is more than the mean of theirs."""
        return (weight_of(metric), self.sources[0].name) in self.table

    def grid(self, metric: str, names: list[str], labels: pd.Series) -> pd.DataFrame:
        """The `Interval` of a metric by checkpoint (a row) and group of expressions (a column).

        Args:
            labels: the group of each row of the table, categorical; a row of several groups has several labels.
        """
        columns = self.table[metric][names]
        weights = self.table[weight_of(metric)][names] if self.is_weighted(metric) else None
        by_group = labels.groupby(labels, observed=False)
        return pd.DataFrame({name: self.intervals(columns, of.index, weights) for name, of in by_group}, names)


def collect(
    benchmark: Benchmark, expressions: Sequence[Expression], sources: Sequence[Source], others: int = 0
) -> Results:
    """Read and score the result files one after the other; keeps the maps of the checkpoints that are shown.

    Args:
        expressions: all of the benchmark's, in the order of the result files.
        sources: by different names.
        others: how many of the sources, the first ones, belong to other runs than the one that the report is about.
            The best of them is the baseline. Without any, it is the first source, or the last if the first is the best.

    Raises:
        ReportError, ResultError: as `read_maps`.
    """
    scores, splits = [], [expression.split for expression in expressions]
    for source in sources:
        columns, _ = settle(score(read_maps(source, expressions), expressions, benchmark.metrics), splits)
        scores.append(_columns(np.stack([*columns.values()], axis=1), columns, source.name))
    table = pd.concat(scores, axis=1)
    facts = facts_of(expressions, readable=table.notna().any(axis=1))
    decisive = table.loc[facts["split"] == next(iter(benchmark.splits)), benchmark.decisive].mean().fillna(0)
    best = decisive.idxmax()
    subject = decisive.iloc[others:].idxmax()
    baseline = decisive.iloc[:others].idxmax() if others else decisive.index[-1 if subject == sources[0].name else 0]
    in_detail = {baseline, subject, sources[-1].name}
    shown = [source for source in sources if len(sources) <= MOST_SHOWN or source.name in in_detail]
    maps_of = {source.name: read_maps(source, expressions) for source in shown}
    lacking = [np.nan] * len(MEASURES)
    for name, maps in maps_of.items():
        pairs = zip(maps, expressions, strict=True)
        rows = [lacking if pred is None else measure_map(pred, expression) for pred, expression in pairs]
        scores.append(_columns(rows, MEASURES, name))
    facts.columns = pd.MultiIndex.from_product([facts.columns, [""]])
    table = pd.concat([facts, *scores], axis=1)
    baseline = None if baseline == subject else baseline
    return Results(benchmark, expressions, sources, table, maps_of, best, subject, baseline)


def _columns(values: Sequence[Sequence[float]] | np.ndarray, measures: Iterable[str], name: str) -> pd.DataFrame:
    """Values (n, measures) of one checkpoint as columns of the table."""
    return pd.DataFrame(values, columns=pd.MultiIndex.from_product([list(measures), [name]]))


def facts_of(expressions: Sequence[Expression], readable: Iterable[bool]) -> pd.DataFrame:
    """The columns that no model changes: what is asked, and sizes.

    The area of the boxes is the part of the image inside them, in 0..1: the accuracy of a random point. Sizes of an
    image that is not `readable` are NaN. Names of sizes have a space, as those of `MEASURES`.
    """
    rows: list[tuple[Hashable, ...]] = []
    for item, known in zip(expressions, readable, strict=True):
        image = str(item.image).encode(errors="backslashreplace").decode()  # a name may be no UTF-8
        sizes: tuple[float, ...] = (np.nan, np.nan, np.nan)
        if known:
            height, width = item.size
            sizes = height, width, inside(item.boxes, height, width).mean()
        rows.append((image, item.text, item.ref_id, item.split, item.categories, len(item.text.split()), *sizes))
    names = ["image", "phrase", "ref_id", "split", "category", "words"]
    names += ["image height", "image width", "area of boxes"]
    return pd.DataFrame(rows, columns=names).astype({"image": "category"})


def measure_map(pred: Tensor, expression: Expression) -> list[float]:
    """`MEASURES` of an expression's map (h, w), in their order."""
    boxes = expression.boxes
    resized = ResizedMap(pred, *expression.size)
    cam = resized.product().numpy()
    mask = inside(boxes, *cam.shape)
    chance = float(mask.mean())
    energy = share_inside(cam.clip(0), mask)
    regions = [hot(cam, threshold) for threshold in THRESHOLDS]
    return [
        energy,
        (energy - chance) / (1 - chance) if chance < 1 else 0.0,
        *(share_inside(region, mask) for region in regions),
        *(float(map_box_correct(resized, region, boxes)) for region in regions),
    ]
