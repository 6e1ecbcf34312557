"""Statistics of studies: bootstrap intervals, Holm's correction, rank correlation and AUC."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from rlspec.tasks.stats import spearman

T = TypeVar("T")
Interval = tuple[float, float]
DRAWS = 2000


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The percentile interval of bootstrap replicates."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
    sample: Sequence[T], statistic: Callable[[list[T]], float | None], *, draws: int = DRAWS, seed: int = 0
) -> list[float]:
    """The statistic of resamples with replacement, where it is defined (Efron 1979)."""
    rng = random.Random(f"bootstrap/{seed}")
    found = (statistic(rng.choices(sample, k=len(sample))) for _ in range(draws))
    return [value for value in found if value is not None]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979): the family-wise error is at most the level compared with."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Probability that a positive's score is above a negative's, ties half (Mann and Whitney 1947); None without both."""
    yes = [s for s, p in zip(scores, positive) if p]
    no = [s for s, p in zip(scores, positive) if not p]
    if not yes or not no:
        return None
    return sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no))


def spearman_interval(x: Sequence[float], y: Sequence[float]) -> Interval | None:
    """Percentile interval of Spearman's correlation over resampled pairs; None where that is not defined.

    Right for dozens of pairs or more, ties and all: it takes nothing for granted about their distribution. Of few pairs
    resamples are too much alike; there, or where only ρ is known, take ``tasks.stats.spearman_fisher_interval``.
    """
    pairs = list(zip(x, y))
    found = bootstrap(pairs, lambda drawn: spearman([a for a, _ in drawn], [b for _, b in drawn]))
    return interval(found) if found and spearman(x, y) is not None else None


def auc_interval(scores: Sequence[float], positive: Sequence[bool]) -> Interval | None:
    """Percentile interval of the AUC over resampled pairs; None where that is not defined."""
    pairs = list(zip(scores, positive))
    found = bootstrap(pairs, lambda drawn: auc([s for s, _ in drawn], [p for _, p in drawn]))
    return interval(found) if found and auc(scores, positive) is not None else None
