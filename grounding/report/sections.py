"""The parts of a benchmark's report: from the arrays of `Results` to tables, charts and pictures."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.reading import read_image
from grounding.pictures.overlay import data_uri
from grounding.pictures.panels import panel
from grounding.report.charts import Panel, chart
from grounding.report.page import Block, Case, Cell, Chart, Part, Sheet, Shot, Table
from grounding.report.rows import MEASURES, THRESHOLDS, Results
from grounding.report.statistics import Group, Interval, by_category, by_length, by_size, intervals
from grounding.results import percent

CASES, CHANGED_CASES = 6, 4  # pictures of each kind
JPEG_QUALITY = 82
INTERVAL_NOTE = "In %, under each its 95% interval (bootstrap over images)."


def cell(interval: Interval, strong: bool = False, signed: bool = False) -> Cell:
    """An accuracy in % with its interval, "-" where there is none."""
    if np.isnan(interval.mean):
        return Cell("-")
    sign = "+" if signed and interval.mean > 0 else ""
    detail = "" if np.isnan(interval.low) else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
    return Cell(sign + percent(interval.mean), detail, strong)


# ---- accuracy


def accuracy(found: Results) -> Part:
    """All checkpoints by metric and split, and what else their log lines tell."""
    columns = [
        (metric, split, name) for metric in found.benchmark.metrics for split, name in found.benchmark.splits.items()
    ]
    heads = [f"{metric} {name}" for metric, _, name in columns]
    by_column: list[list[Interval]] = []
    for metric, split, _ in columns:
        chosen = found.splits == split
        values = np.stack([found.metric(metric, source)[chosen] for source in range(len(found.sources))], axis=1)
        by_column.append(intervals(values, found.images[chosen]))
    rows = [
        [
            Cell(source.name),
            *(cell(column[index], strong=index == found.best and len(found.sources) > 1) for column in by_column),
        ]
        for index, source in enumerate(found.sources)
    ]
    best = f" In bold the best by {found.benchmark.metrics[-1]} {columns[0][2]}." if len(rows) > 1 else ""
    charts = []
    if len(rows) > 1:
        names = found.names(range(len(rows)))
        one_run = len({source.folder.folder for source in found.sources}) == 1
        for metric in found.benchmark.metrics:
            of = [(name, row) for (one, _, name), row in zip(columns, by_column, strict=True) if one == metric]
            uri = chart([Panel(f"{metric.capitalize()} accuracy", names, dict(of))], joined=one_run)
            charts.append(Chart(f"{metric.capitalize()} accuracy of the checkpoints, with 95% intervals.", uri))
    title = " and ".join(found.benchmark.metrics).capitalize()
    return Part("Accuracy", INTERVAL_NOTE + best, [Table(title, "", ["", *heads], rows, charts), *_logged(found)])


def _logged(found: Results) -> list[Block]:
    """A table of the log lines beyond the metrics' (matching), where there are any."""
    more = [source.folder.lines(source.epoch)[len(found.benchmark.metrics) :] for source in found.sources]
    values = [{key: value for line in lines for key, value in line.items() if key != "epoch"} for lines in more]
    heads = list(dict.fromkeys(key for row in values for key in row))
    titles = [head.replace("_", " ") for head in heads]
    rows = [
        [Cell(source.name), *(Cell(percent(row.get(key))) for key in heads)]
        for source, row in zip(found.sources, values, strict=True)
    ]
    return [Table("Image-text matching, from log.txt", "", ["", *titles], rows)] if heads else []


# ---- further measures

MEASURES_NOTE = (
    "Pixels are inside that the pointing game counts as right. The energy is the sum of the map; above chance, 0 is "
    "what a flat map would have and 100 all of it inside. Pointing at t: the share of the pixels with at least t of "
    "the maximum that are inside; at 1 it is the pointing game. Box from the map at t: of the boxes around the "
    "connected regions of these pixels, the one that scores best as a detection would (the map's sum in it over the "
    "square root of its area); right at IoU 0.5 or more."
)


def further_measures(found: Results) -> Part:
    """What the maps of the shown checkpoints are worth by other measures, over all reported splits."""
    by_source = {
        name: intervals(found.measured[index][found.reported], found.images[found.reported])
        for name, index in zip(found.names(), found.shown, strict=True)
    }
    rows = [
        [Cell(title), *(cell(row[place]) for row in by_source.values())]
        for place, title in enumerate(MEASURES.values())
    ]
    area = percent(float(found.areas[found.reported].mean()) if found.reported.any() else None)
    note = f"{INTERVAL_NOTE} All reported splits together. {MEASURES_NOTE} The boxes cover {area}% of the images."
    places = [f"{threshold:g}" for threshold in THRESHOLDS]
    panels = [
        Panel(title, places, {name: [row[index] for index in _places(kind)] for name, row in by_source.items()})
        for title, kind in (("Pointing at a part of the maximum", "hot"), ("Box from the map, IoU 0.5", "map box"))
    ]
    title = "Pointing, and boxes from the map, at several thresholds; with 95% intervals."
    table = Table("Maps and boxes", "", ["", *by_source], rows, [Chart(title, chart(panels))])
    return Part("Further measures", note, [table])


def _places(kind: str) -> list[int]:
    return [list(MEASURES).index(f"{kind} {threshold}") for threshold in THRESHOLDS]


# ---- groups


def groups(found: Results) -> Part:
    """The shown checkpoints by box size, phrase length and category, a table a metric."""
    texts = [expression.text for expression in found.expressions]
    kinds = {
        "by box size": (by_size(found.areas), "The boxes' part of the image, in fixed bins."),
        "by phrase length": (by_length(texts), "Words of the cleaned phrase, in fixed bins."),
        "by category": (
            by_category([expression.categories for expression in found.expressions]),
            "As the annotations name it; a phrase of several counts in each.",
        ),
    }
    blocks: list[Block] = []
    for metric in found.benchmark.metrics:
        for title, (every, note) in kinds.items():
            kept = [Group(name, chosen[found.reported[chosen]]) for name, chosen in every]
            kept = [group for group in kept if len(group.chosen)]
            if len(kept) > 1:
                by_group = [_group_intervals(found, metric, group) for group in kept]
                full = f"{metric.capitalize()} accuracy {title}"
                lines = dict(zip(found.names(), zip(*by_group, strict=True), strict=True))
                panel = Panel(full, [group.name for group in kept], lines)
                ordered = title != "by category"
                drawn = Chart(f"{full}, with 95% intervals.", chart([panel], joined=ordered))
                blocks.append(_group_table(found, full, note, kept, by_group)._replace(charts=[drawn]))
    note = f"{INTERVAL_NOTE} All reported splits together. The area of the boxes is what a random point would get."
    return Part("By size, length and category", note, blocks)


def _group_intervals(found: Results, metric: str, group: Group) -> list[Interval]:
    """An interval a shown source."""
    values = np.stack([found.metric(metric, index)[group.chosen] for index in found.shown], axis=1)
    return intervals(values, found.images[group.chosen])


def _group_table(
    found: Results, title: str, note: str, kept: Sequence[Group], by_group: Sequence[Sequence[Interval]]
) -> Table:
    rows = []
    for group, row in zip(kept, by_group, strict=True):
        chance = percent(float(found.areas[group.chosen].mean()))
        rows.append([Cell(group.name), Cell(str(len(group.chosen))), Cell(chance), *(cell(value) for value in row)])
    return Table(title, note, ["", "phrases", "area of boxes", *found.names()], rows)


# ---- pictures


def cases(found: Results) -> Part:
    """The best, the most typical and the worst maps of the subject."""
    name = found.sources[found.subject].name
    values = np.where(found.reported, found.measure("lift", found.subject), np.nan)
    energy = found.measure("energy", found.subject)
    note = (
        f"By the share of energy inside the boxes, above chance, of {name}; one expression an image. White: the true "
        "boxes. Dot: the map's maximum, green where the pointing game counts it as right, else red."
    )
    blocks: list[Block] = []
    for kind, chosen in zip(("Best", "Typical", "Worst"), extremes(values, _images(found), CASES), strict=True):
        shown = [_picture(found, position, f"energy inside {percent(energy[position])}%") for position in chosen]
        if shown:
            blocks.append(Sheet(f"{kind} cases", "", shown))
    return Part(f"Cases of {name}", note, blocks)


def extremes(values: np.ndarray, images: Sequence[Path], count: int) -> tuple[list[int], list[int], list[int]]:
    """Positions of the highest, the most median and the lowest values, each up to `count`, at most one of an image.

    Of few images, each gets a third, so that the best and the worst do not meet. Equal values are taken in their order;
    NaN never; none twice.

    Args:
        values, images: one an expression.
    """
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return [], [], []
    count = min(count, math.ceil(len({images[i] for i in known.tolist()}) / 3))
    used: set[Path] = set()
    orders = (-values, values, np.abs(values - np.median(values[known])))
    best, worst, typical = (
        pick((known[i] for i in np.argsort(order[known], kind="stable")), images, count, used) for order in orders
    )
    return best, typical, worst


def pick(order: Iterable[int], images: Sequence[Path], count: int, used: set[Path] | None = None) -> list[int]:
    """The first `count` positions of an order whose images are not in `used`, which takes them in."""
    used = set() if used is None else used
    chosen: list[int] = []
    for position in map(int, order):
        if len(chosen) == count:
            break
        if images[position] not in used:
            used.add(images[position])
            chosen.append(position)
    return chosen


def _picture(found: Results, position: int, note: str) -> Case:
    """An expression: the image with its true boxes, then each shown checkpoint's map and point."""
    expression = found.expressions[position]
    image, size, boxes = read_image(expression.image, expression.text), expression.size, expression.boxes
    shots = [Shot("image", _uri(panel(image, size, boxes, None)), None)]
    for index in found.shown:
        pred = found.maps[index][position]
        if pred is not None:
            right = bool(found.metric("point", index)[position])
            shots.append(Shot(found.sources[index].name, _uri(panel(image, size, boxes, pred, right)), right))
    return Case(expression.text, note, shots)


def _uri(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=JPEG_QUALITY)
    return data_uri("image/jpeg", content.getvalue())


def _images(found: Results) -> list[Path]:
    return [expression.image for expression in found.expressions]


# ---- comparison


def comparison(found: Results, first: int, second: int) -> Part:
    """Two checkpoints against each other: which expressions only one of them grounds right."""
    a, b = found.names([first, second])
    rows = []
    for metric in found.benchmark.metrics:
        for split, name in found.benchmark.splits.items():
            chosen = found.splits == split
            one, other = (found.metric(metric, source)[chosen] for source in (first, second))
            counts = [int(((one == left) & (other == right)).sum()) for left, right in ((1, 1), (1, 0), (0, 1), (0, 0))]
            (difference,) = intervals((other - one)[:, None], found.images[chosen])
            rows.append([Cell(f"{metric} {name}"), *map(Cell, map(str, counts)), cell(difference, signed=True)])
    head = ["", "both right", f"only {a}", f"only {b}", "neither", "difference"]
    note = f"Expressions; the difference is {b} less {a}, in points, with its 95% interval (paired, over images)."
    blocks: list[Block] = [Table("Outcomes", "", head, rows)]
    one, other = (found.metric("point", source) for source in (first, second))
    for name, only in ((b, (one == 0) & (other == 1)), (a, (one == 1) & (other == 0))):
        blocks += _changed(found, name, np.flatnonzero(only & found.reported), first, second)
    return Part(f"{a} and {b}", note, blocks)


def _changed(found: Results, name: str, changed: np.ndarray, first: int, second: int) -> list[Block]:
    """Pictures of a few expressions that only one model's point grounds right, and the list of all."""
    if not len(changed):
        return []
    change = np.abs(found.measure("lift", second) - found.measure("lift", first))
    chosen = pick(changed[np.argsort(-change[changed], kind="stable")], _images(found), CHANGED_CASES)
    shown = [_picture(found, position, "") for position in chosen]
    rows = []
    for position in changed.tolist():
        expression = found.expressions[position]
        split = found.benchmark.splits[expression.split]
        rows.append([Cell(expression.text), Cell(expression.image.name), Cell(str(expression.ref_id)), Cell(split)])
    title = f"Right by point only with {name}"
    return [
        Sheet(f"{title}: {len(shown)} of {len(rows)}", "Those whose share of energy inside changed most.", shown),
        Table(f"{title}: all {len(rows)}", "", ["phrase", "image", "ref_id", "split"], rows, folded=True),
    ]


# ---- origins


def origins(found: Results) -> Part:
    """What each result was computed from."""
    keys = {"checkpoint": "checkpoint", "gradcam_mode": "mode", "block_num": "layer", "precision": "precision"}
    rows = []
    for source in found.sources:
        origin = source.folder.origin(source.epoch)
        left_out = Cell(str(len(origin.get("skipped", []))))
        rows.append([Cell(source.name), *(Cell(str(origin.get(key, "-"))) for key in keys), left_out])
    return Part("What was evaluated", "", [Table("Results", "", ["", *keys.values(), "left out"], rows)])
