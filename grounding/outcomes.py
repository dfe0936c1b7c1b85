"""Results read back: for each expression, whether and how well a stored map grounds it."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

import utils
from dataset.expressions import Expression
from dataset.reading import image_size
from grounding import measures, metrics
from grounding.results import ResultFolder

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


class Source(NamedTuple):
    """The results of one checkpoint, under the name that it has in the report."""

    name: str
    folder: ResultFolder
    epoch: str


def size_of(expression: Expression) -> tuple[int, int]:
    """(height, width) in pixels that its boxes refer to: as annotated in Flickr30k, else the image's own."""
    if "image_height" in expression.record:
        return expression.record["image_height"], expression.record["image_width"]
    return _file_size(expression.image)


_file_size = functools.lru_cache(maxsize=1 << 16)(image_size)  # expressions share images, and models share expressions


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
        measures.inside(item.boxes, *size_of(item)).mean() if readable else np.nan
        for item, readable in zip(expressions, known.tolist(), strict=True)
    ]
    return np.array(found)


def score(maps: Sequence[Tensor | None], expressions: Sequence[Expression], names: Sequence[str]) -> np.ndarray:
    """Which expressions are grounded right by the benchmark's metrics: (n, metrics), 1 or 0, NaN without a map.

    Args:
        names: "point" and "box", as `Benchmark.metrics`.
    """
    found = np.full((len(expressions), len(names)), np.nan)
    for row, pred, expression in zip(found, maps, expressions, strict=True):
        if pred is not None:
            cam = metrics.ResizedMap(pred, *size_of(expression))
            row[:] = [_right(name, cam, expression) for name in names]
    return found


def _right(name: str, cam: metrics.ResizedMap, expression: Expression) -> bool:
    if name == "point":
        return metrics.point_correct(cam, expression.boxes)
    assert expression.detections is not None
    return metrics.box_correct(cam, expression.detections, expression.boxes[0])


def measure(maps: Sequence[Tensor | None], expressions: Sequence[Expression]) -> np.ndarray:
    """The further measures: (n, len(MEASURES)) in the order of `MEASURES`, NaN without a map. One map at a time."""
    found = np.full((len(expressions), len(MEASURES)), np.nan)
    for row, pred, expression in zip(found, maps, expressions, strict=True):
        if pred is not None:
            height, width = size_of(expression)
            cam = metrics.ResizedMap(pred, height, width).product().numpy()
            row[:] = _measure(cam, expression.boxes)
    return found


def _measure(cam: np.ndarray, boxes: np.ndarray) -> list[float]:
    mask = measures.inside(boxes, *cam.shape)
    energy = measures.energy_inside(cam, mask)
    regions = [measures.hot(cam, threshold) for threshold in THRESHOLDS]
    drawn = [measures.map_box(cam, region) for region in regions]
    return [
        energy,
        measures.above_chance(energy, float(mask.mean())),
        *(measures.hot_inside(region, mask) for region in regions),
        *(float(box is not None and overlaps(box, boxes)) for box in drawn),
    ]


def overlaps(box: Sequence[float], boxes: np.ndarray) -> bool:
    """Whether a box has IoU >= 0.5 with any of (n, 4)."""
    return any(metrics.iou(box, other) >= metrics.IOU_THRESHOLD for other in boxes.tolist())


# ---- which results a report is about


def sources_of(folders: Sequence[Path], metrics_count: int) -> list[Source]:
    """Every complete checkpoint in --output_dir folders, in their order, by the checkpoint's own name.

    Raises:
        ReportError: a folder has no complete results.
    """
    found = []
    for folder in folders:
        results = ResultFolder(folder / "result")
        epochs = list(dict.fromkeys(row.get("epoch") for row in utils.read_log(results.log)))
        complete = [epoch for epoch in epochs if epoch and len(results.lines(epoch)) >= metrics_count]
        if not complete:
            raise ReportError(f"{folder}: no complete results in {results.log}; is it an --output_dir of this script?")
        for epoch in complete:
            checkpoint = results.origin(epoch).get("checkpoint", f"epoch {epoch}")
            found.append(Source(Path(checkpoint).stem, results, epoch))
    return found


def named_apart(sources: Sequence[Source]) -> list[Source]:
    """The sources, those that are called alike by their folder and epoch instead."""
    names = [source.name for source in sources]
    return [
        source
        if names.count(source.name) == 1
        else source._replace(name=f"{source.folder.folder.parent} epoch {source.epoch}")
        for source in sources
    ]


def shown(count: int, compared: Sequence[int], most: int = MOST_SHOWN) -> list[int]:
    """The results that are shown in detail: all if few, else the two that are compared and the last."""
    return list(range(count)) if count <= most else sorted({*compared, count - 1})
