"""The parts of a benchmark's report: from the table of `Results` to what report.html shows."""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from dataset.reading import read_image
from grounding.maps import ResizedMap
from grounding.metrics import point_correct
from grounding.pictures.panels import panel
from grounding.pictures.render import data_uri
from grounding.report.charts import chart
from grounding.report.rows import MAP_BOX, MEASURES, POINTING, THRESHOLDS, Results
from grounding.report.statistics import by_category, by_length, by_size
from grounding.results import percent

CASES, CHANGED_CASES = 6, 4  # pictures of each kind
RIGHT = 0.5  # a metric of this value or more counts as right where two checkpoints are compared
JPEG_QUALITY = 82
INTERVAL_NOTE = "In %, under each its 95% interval (bootstrap over images)."
MEASURES_NOTE = (
    "Pixels are inside that the pointing game counts as right. The energy is the sum of the map; above chance, 0 is "
    "what a flat map would have and 100 all of it inside. Pointing at t: the share of the pixels with at least t of "
    "the maximum that are inside; at 1 it is the pointing game. Box from the map at t: of the boxes around the "
    "connected regions of these pixels, the one that scores best as a detection would (the map's sum in it over the "
    "square root of its area); right at IoU 0.5 or more."
)

Shot = tuple[str, str, bool | None]  # name, picture as a data URI, whether the model's point is right (if one is shown)


class ShownCase(NamedTuple):
    """An expression with its pictures."""

    text: str
    note: str
    shots: Sequence[Shot]


class Block(NamedTuple):
    """A table with charts beside it, or a chart, or cases.

    Args:
        table: of texts, counts and `Interval`s; its index holds the names of the rows.
        charts: data URIs, by what describes a chart to those who cannot see it.
        bold: the row whose intervals are bold.
        signed: whether intervals above 0 have a "+".
        folded: whether the table is hidden until the reader opens it.
    """

    title: str = ""
    note: str = ""
    table: pd.DataFrame | None = None
    charts: Mapping[str, str] = {}
    cases: Sequence[ShownCase] = ()
    bold: str | None = None
    signed: bool = False
    folded: bool = False


class Part(NamedTuple):
    """A part of a section, under a heading with a note."""

    title: str
    note: str
    blocks: Sequence[Block]


def accuracies(found: Results) -> Part:
    """All checkpoints by metric and split, and what else their log lines hold."""
    names = found.benchmark.splits
    splits = found.table["split"].map(names).astype(pd.CategoricalDtype(list(names.values())))
    every = [source.name for source in found.sources]
    grids = {metric: found.grid(metric, every, splits) for metric in found.benchmark.metrics}
    one_run = len({source.folder.folder for source in found.sources}) == 1
    note, charts = INTERVAL_NOTE, {}
    if several := len(found.sources) > 1:
        note += f" In bold the best by {found.benchmark.decisive} {splits.cat.categories[0]}."
        for metric, grid in grids.items():
            title = f"{metric.capitalize()} accuracy"
            charts[f"{title} of the checkpoints, with 95% intervals."] = chart({title: grid}, joined=one_run)
    table = pd.concat([grid.add_prefix(f"{metric} ") for metric, grid in grids.items()], axis=1)
    title = " and ".join(grids).capitalize()
    return Part(
        "Accuracy", note, [Block(title, "", table, charts, bold=found.best if several else None), *_logged(found)]
    )


def _logged(found: Results) -> list[Block]:
    """A table of the log lines beyond the metrics' (matching), where there are any."""
    values = []
    for _, folder, epoch in found.sources:
        more = folder.lines(epoch)[len(folder.metrics(epoch, found.benchmark.own_metrics)) :]
        values.append({key: value for line in more for key, value in line.items() if key != "epoch"})
    table = pd.DataFrame(values, [source.name for source in found.sources], dtype=float)
    table = table.map(lambda value: percent(None if math.isnan(value) else value))
    table = table.rename(columns=lambda key: key.replace("_", " "))
    return [] if table.empty else [Block("Image-text matching, from log.txt", "", table)]


def further_measures(found: Results) -> Part:
    """How good the maps of the shown checkpoints are by other measures, over all reported splits."""
    measured = found.table[list(MEASURES)]
    columns = {name: found.intervals(measured.xs(name, axis=1, level=1), found.reported) for name in found.shown}
    grid = pd.DataFrame(columns, list(MEASURES))
    panels = {
        title: grid.loc[list(kind)].set_axis([f"{threshold:g}" for threshold in THRESHOLDS])
        for title, kind in (("Pointing at a part of the maximum", POINTING), ("Box from the map, IoU 0.5", MAP_BOX))
    }
    charts = {"Pointing, and boxes from the map, at several thresholds; with 95% intervals.": chart(panels)}
    area = percent(found.table.loc[found.reported, "area of boxes"].mean() if found.reported.any() else None)
    note = f"{INTERVAL_NOTE} All reported splits together. {MEASURES_NOTE} The boxes cover {area}% of the images."
    return Part("Further measures", note, [Block("Maps and boxes", "", grid.rename(MEASURES), charts)])


def groups(found: Results) -> Part:
    """The shown checkpoints by box size, phrase length and category: a table a metric."""
    table = found.table
    kinds = {
        "by box size": (by_size(table["area of boxes"]), "The boxes' part of the image, in fixed bins."),
        "by phrase length": (by_length(table["words"]), "Words of the cleaned phrase, in fixed bins."),
        "by category": (
            by_category(table["category"]),
            "As the annotations name it; a phrase of several counts in each.",
        ),
    }
    blocks = []
    for metric in found.benchmark.metrics:
        for kind, (labels, note) in kinds.items():
            labels = labels[found.reported[labels.index]].cat.remove_unused_categories()
            if labels.nunique() > 1:
                grid = found.grid(metric, found.shown, labels).T
                title = f"{metric.capitalize()} accuracy {kind}"
                charts = {f"{title}, with 95% intervals.": chart({title: grid}, joined=kind != "by category")}
                areas = table.loc[labels.index, "area of boxes"].groupby(labels.array, observed=True)
                grid.insert(0, "phrases", areas.size())
                grid.insert(1, "area of boxes", areas.mean().map(percent))
                blocks.append(Block(title, note, grid, charts))
    note = f"{INTERVAL_NOTE} All reported splits together. The area of the boxes is what a random point would get."
    return Part("By size, length and category", note, blocks)


# ---- pictures


def cases(found: Results) -> Part:
    """The best, the most typical and the worst maps of the subject."""
    name = found.subject
    values = found.table["energy above chance", name][found.reported]
    energy = found.table["energy inside", name].map(percent)
    note = (
        f"By the share of energy inside the boxes, above chance, of {name}; one expression an image. White: the true "
        "boxes. Dot: the map's maximum, green where the pointing game counts it as right, else red."
    )
    chosen = zip(("Best", "Typical", "Worst"), extremes(values, found.table["image"], CASES), strict=True)
    blocks = [
        Block(f"{kind} cases", cases=[_case(found, row, f"energy inside {energy[row]}%") for row in rows])
        for kind, rows in chosen
        if rows
    ]
    return Part(f"Cases of {name}", note, blocks)


def extremes(values: pd.Series, images: pd.Series, count: int) -> tuple[list[int], list[int], list[int]]:
    """Rows of the highest, the most median and the lowest values, each up to `count`, at most one an image.

    Of few images, each gets a third, so that the best and the worst do not meet. Of equal values, the first is taken;
    no row is taken twice, and none with NaN.
    """
    values = values.dropna()
    count = min(count, math.ceil(images[values.index].nunique() / 3))
    best = one_an_image(-values, images, count)
    worst = one_an_image(values, images, count, best)
    typical = one_an_image((values - values.median()).abs(), images, count, best + worst)
    return best, typical, worst


def one_an_image(values: pd.Series, images: pd.Series, count: int, taken: Collection[int] = ()) -> list[int]:
    """The rows of the `count` lowest values, of different images, none of which is an image of the rows `taken`."""
    ordered = images[values.sort_values(kind="stable").index]
    return ordered[~ordered.isin(images[list(taken)])].drop_duplicates().index[:count].tolist()


def _case(found: Results, row: int, note: str) -> ShownCase:
    """An expression: the image with its true boxes, then the map and the point of each shown checkpoint."""
    expression = found.expressions[row]
    image, size, boxes = read_image(expression.image, expression.text), expression.size, expression.boxes
    maps = {name: of[row] for name, of in found.maps.items() if of[row] is not None}
    shots = []
    for name, pred in [("image", None), *maps.items()]:
        right = None if pred is None else point_correct(ResizedMap(pred, *size), boxes)
        content = io.BytesIO()
        panel(image, size, boxes, pred, bool(right)).save(content, "JPEG", quality=JPEG_QUALITY)
        shots.append((name, data_uri("image/jpeg", content.getvalue()), right))
    return ShownCase(expression.text, note, shots)


# ---- comparison


def comparison(found: Results, a: str, b: str) -> Part:
    """Two checkpoints against each other: which expressions only one of them grounds right."""
    rows = {}
    for metric in found.benchmark.metrics:
        if found.is_weighted(metric):  # a difference of ratios of sums is no mean of differences
            continue
        for split, name in found.benchmark.splits.items():
            one, other = (found.table[metric, which][found.table["split"] == split] for which in (a, b))
            only_one, only_other = _only(one, other)
            both, neither = (one >= RIGHT) & (other >= RIGHT), (one < RIGHT) & (other < RIGHT)
            counts = [int(chosen.sum()) for chosen in (both, only_one, only_other, neither)]
            rows[f"{metric} {name}"] = [*counts, *found.intervals((other - one).to_frame(), one.index)]
    head = ["both right", f"only {a}", f"only {b}", "neither", "difference"]
    blocks = [Block("Outcomes", "", pd.DataFrame.from_dict(rows, "index", columns=head), signed=True)]
    note = f"Expressions; the difference is {b} less {a}, in points, with its 95% interval (paired, over images)."
    decisive = found.benchmark.decisive
    only_a, only_b = _only(*(found.table[decisive, which][found.reported] for which in (a, b)))
    change = (found.table["energy above chance", b] - found.table["energy above chance", a]).abs()
    for name, only in ((b, only_b), (a, only_a)):
        blocks += _changed(found, f"Right by {decisive} only with {name}", change[only.index[only]])
    return Part(f"{a} and {b}", note, blocks)


def _only(one: pd.Series, other: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Which expressions only the one, and only the other checkpoint grounds right; false without a map of either."""
    return (one >= RIGHT) & (other < RIGHT), (one < RIGHT) & (other >= RIGHT)


def _changed(found: Results, title: str, change: pd.Series) -> Sequence[Block]:
    """Pictures of the expressions with the largest change, and the list of all."""
    if change.empty:
        return []
    shown = [_case(found, row, "") for row in one_an_image(-change, found.table["image"], CHANGED_CASES)]
    every = [found.expressions[row] for row in change.index]
    rows = [(item.text, item.image.name, item.ref_id, found.benchmark.splits[item.split]) for item in every]
    table = pd.DataFrame(rows, columns=["phrase", "image", "ref_id", "split"]).set_index("phrase")
    return [
        Block(
            f"{title}: {len(shown)} of {len(table)}", "Those whose share of energy inside changed most.", cases=shown
        ),
        Block(f"{title}: all {len(table)}", table=table, folded=True),
    ]


# ---- origins


def origins(found: Results) -> Part:
    """What each result was computed from."""
    keys = {"checkpoint": "checkpoint", "gradcam_mode": "mode", "block_num": "layer", "precision": "precision"}
    records = [source.folder.origin(source.epoch) for source in found.sources]
    rows = [[*(str(record.get(key, "-")) for key in keys), len(record.get("skipped", []))] for record in records]
    table = pd.DataFrame(rows, [source.name for source in found.sources], [*keys.values(), "left out"])
    return Part("What was evaluated", "", [Block("Results", "", table)])
