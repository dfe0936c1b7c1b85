"""Accuracies with bootstrap intervals over images, and groups of expressions. Pure functions."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from grounding.results import percent

RESAMPLES = 2000
LEVEL = 0.95

SIZE_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the image's area
SIZES = ("under 1%", "1 to 2%", "2 to 5%", "5 to 10%", "10 to 20%", "20 to 50%", "50% and more")
LENGTH_EDGES = (1, 2, 3, 5, 8)  # words: the last of each bin but the last bin
LENGTHS = ("1 word", "2 words", "3 words", "4 to 5 words", "6 to 8 words", "9 words and more")


class Interval(NamedTuple):
    """A mean with its 95% interval. All are NaN without values; the interval is NaN where all are of one image."""

    mean: float
    low: float
    high: float

    def text(self, signed: bool = False) -> str:
        """The mean in %, "-" where there is none; `signed`: with "+" above 0."""
        return "-" if math.isnan(self.mean) else ("+" if signed and self.mean > 0 else "") + percent(self.mean)

    @property
    def range(self) -> str:
        """The interval in %, empty where there is none."""
        return "" if math.isnan(self.low) else f"{100 * self.low:.1f} to {100 * self.high:.1f}"


def intervals(
    values: np.ndarray,
    images: np.ndarray,
    weights: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """The mean of each column, with a percentile bootstrap interval over images.

    Expressions of one image are not independent. Images are therefore drawn with replacement, and each drawn image
    counts with all its expressions. All columns share the draws; for the difference of two models, pass the column of
    differences.

    Args:
        values: (n, m), one row an expression; NaN does not count.
        images: (n,) the number of each expression's image, any integers.
        weights: (n, m) of the values in their mean; None: equal ones.
    """
    used = ~np.isnan(values).all(axis=1)
    known = np.where(np.isnan(values), 0, np.ones_like(values) if weights is None else weights)
    both = np.hstack([np.nan_to_num(values) * known, known])[used]  # what is summed, and what that is divided by
    by_image = pd.DataFrame(both).groupby(images[used]).sum().to_numpy()
    with np.errstate(invalid="ignore"):  # NaN where there is no value
        means = np.divide(*np.hsplit(both.sum(axis=0), 2))
        ends = np.full((2, len(means)), np.nan)
        usable = (by_image[:, len(means) :] > 0).sum(axis=0) > 1
        if usable.any():
            rng, count = np.random.default_rng(seed), len(by_image)
            times = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples))
            drawn = np.divide(*np.hsplit(np.array([each @ by_image for each in times]), 2))
            ends[:, usable] = np.nanquantile(drawn[:, usable], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [Interval(*row) for row in np.stack([means, *ends], axis=1).tolist()]


# ---- groups: a label for each expression, categorical in the order of the groups


def by_size(areas: pd.Series) -> pd.Series:
    """Groups by the boxes' part of the image, in 0..1; an edge belongs to the group above it."""
    return pd.cut(areas, [-math.inf, *SIZE_EDGES, math.inf], right=False, labels=SIZES)


def by_length(words: pd.Series) -> pd.Series:
    """Groups by the number of words."""
    return pd.cut(words, [-math.inf, *LENGTH_EDGES, math.inf], labels=LENGTHS)


def by_category(categories: pd.Series, most: int = 20) -> pd.Series:
    """Groups by category, the most frequent first (then by name); those beyond `most` are together the last group.

    An expression of several categories has a row for each; an expression without any has none.

    Args:
        categories: a sequence of names for each expression.
    """
    names = _without_repeats(categories.explode().dropna())
    counts = names.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    shown = counts.index[: None if len(counts) <= most else most - 1]
    others = f"{len(counts) - len(shown)} other categories"
    names = _without_repeats(names.where(names.isin(shown), others))
    return names.astype(pd.CategoricalDtype([*shown, others]))


def _without_repeats(labels: pd.Series) -> pd.Series:
    """Each label of an expression once."""
    return labels[~pd.MultiIndex.from_arrays([labels.index, labels]).duplicated()]
