"""Accuracies with their uncertainty: bootstrap intervals over images, and groups of expressions. Pure functions."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
DRAWN_AT_ONCE = 4_000_000  # image indices; 32 MB of them

SIZE_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the image's area
LENGTH_EDGES = (1, 2, 3, 5, 8)  # words: the last of each bin but the last


class Interval(NamedTuple):
    """A mean and its 95% interval, NaN where there are no values; the interval also where one image has them all."""

    mean: float
    low: float
    high: float


class Group(NamedTuple):
    """Some of the expressions, by what they have in common.

    Args:
        chosen: their positions, ascending.
    """

    name: str
    chosen: np.ndarray


def intervals(values: np.ndarray, images: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[Interval]:
    """The mean of each column, and where it would lie in 95% of samples of as many other images.

    Expressions of an image are not independent, so that images are drawn, with replacement, and each drawn one counts
    with all its expressions (percentile bootstrap of a ratio). Columns share the draws: of the difference of two
    models, give the column of differences.

    Args:
        values: (n, m), an expression a row; NaN does not count.
        images: (n,) the number of each expression's image, any integers.
    """
    columns = values.shape[1]
    known = ~np.isnan(values)
    _, image = np.unique(images[known.any(axis=1)], return_inverse=True)
    kept, counted = values[known.any(axis=1)], known[known.any(axis=1)]
    count = int(image.max()) + 1 if len(image) else 0
    sums, counts = (np.zeros((count, columns)) for _ in range(2))
    np.add.at(sums, image, np.where(counted, kept, 0))
    np.add.at(counts, image, counted)
    totals = counts.sum(axis=0)
    means = np.divide(sums.sum(axis=0), totals, out=np.full(columns, np.nan), where=totals > 0)
    ends = np.full((2, columns), np.nan)
    if count > 1:
        drawn = _resampled(sums, counts, resamples, np.random.default_rng(seed))
        usable = (counts > 0).sum(axis=0) > 1
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        ends[:, usable] = np.nanquantile(drawn[:, usable], tails, axis=0)
    return [Interval(*row) for row in np.stack([means, *ends], axis=1).tolist()]


def _resampled(sums: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means (resamples, m) over images drawn with replacement, NaN where none of them has a value.

    Args:
        sums, counts: (images, m).
    """
    images = len(sums)
    parts = []
    at_once = max(1, DRAWN_AT_ONCE // images)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)
        total = weights @ counts
        parts.append(np.divide(weights @ sums, total, out=np.full(total.shape, np.nan), where=total > 0))
    return np.concatenate(parts)


# ---- groups


def by_size(areas: np.ndarray) -> list[Group]:
    """Groups by the boxes' part of the image (n,), in 0..1, at the fixed `SIZE_EDGES`; an edge belongs to the upper."""
    bins = np.digitize(areas, SIZE_EDGES)
    percents = [f"{100 * edge:g}" for edge in SIZE_EDGES]
    names = [
        f"under {percents[0]}%",
        *(f"{low} to {high}%" for low, high in itertools.pairwise(percents)),
        f"{percents[-1]}% and more",
    ]
    return _groups(bins, names)


def by_length(texts: Sequence[str]) -> list[Group]:
    """Groups by the number of words, at the fixed `LENGTH_EDGES`."""
    bins = np.digitize([len(text.split()) for text in texts], LENGTH_EDGES, right=True)
    names = []
    for before, last in zip((0, *LENGTH_EDGES), LENGTH_EDGES, strict=False):
        words = str(last) if last == before + 1 else f"{before + 1} to {last}"
        names.append(f"{words} word{'' if last == 1 else 's'}")
    return _groups(bins, [*names, f"{LENGTH_EDGES[-1] + 1} words and more"])


def by_category(categories: Sequence[Sequence[str]], most: int = 20) -> list[Group]:
    """Groups by category, the most frequent first (then by name), those beyond `most` together as the last.

    An expression of several categories is in the group of each; one without is in none.
    """
    counts = Counter(name for names in categories for name in set(names))
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    shown = ordered if len(ordered) <= most else ordered[: most - 1]
    groups = [Group(name, _where(name in of for of in categories)) for name in shown]
    if rest := set(ordered[len(shown) :]):
        groups.append(Group(f"{len(rest)} other categories", _where(bool(rest & set(of)) for of in categories)))
    return groups


def _groups(bins: np.ndarray, names: Sequence[str]) -> list[Group]:
    groups = [Group(name, np.flatnonzero(bins == number)) for number, name in enumerate(names)]
    return [group for group in groups if len(group.chosen)]


def _where(true: Iterable[bool]) -> np.ndarray:
    return np.flatnonzero(np.fromiter(true, bool))
