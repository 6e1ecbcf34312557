"""Intervals and tests for success counts, and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atanh, comb, sqrt, tanh


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (E. B. Wilson 1927); 95 % by default.

    Unlike the normal interval it stays inside [0, 1] and is sensible at 0 and n successes.

    Raises:
        ValueError: ``n`` is not positive or ``successes`` lies outside 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials is no proportion")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n successes the bound is exactly 0 or 1; rounding must not say otherwise.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True)
class McNemarResult:
    """Exact McNemar test on paired outcomes.

    Attributes:
        gained: pairs that failed before and succeed after.
        lost: pairs that succeeded before and fail after.
        p_value: two-sided exact binomial p-value of ``gained`` against ``lost`` (1 when both are 0).
    """

    gained: int
    lost: int
    p_value: float


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemarResult:
    """Compare two checkpoints on the same problems (Q. McNemar 1947, exact form).

    Only the problems on which the two differ carry evidence; under the null each is a fair coin.

    Raises:
        ValueError: the two sequences differ in length, so the outcomes cannot be paired.
    """
    if len(before) != len(after):
        raise ValueError(f"outcomes of {len(before)} and of {len(after)} problems cannot be paired")
    gained = sum(1 for b, a in zip(before, after) if a and not b)
    lost = sum(1 for b, a in zip(before, after) if b and not a)
    n, small = gained + lost, min(gained, lost)
    # Integer arithmetic, so that thousands of discordant pairs neither overflow nor vanish.
    tail = 2 * sum(comb(n, i) for i in range(small + 1))
    p_value = 1.0 if tail >= 2**n else tail / 2**n
    return McNemarResult(gained, lost, p_value)


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; ties share their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end + 1) / 2
        start = end
    return ranks


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than 3 pairs or where one side does not vary."""
    if len(x) < 3:
        return None
    a, b = _ranks(x), _ranks(y)
    centre = (len(x) + 1) / 2
    saa = sum((v - centre) ** 2 for v in a)
    sbb = sum((v - centre) ** 2 for v in b)
    if saa == 0 or sbb == 0:
        return None
    covariance = sum((v - centre) * (w - centre) for v, w in zip(a, b))
    return float(covariance / (saa * sbb) ** 0.5)


def spearman_fisher_interval(rho: float, n: int, z: float = 1.959963984540054) -> tuple[float, float] | None:
    """Interval of Spearman's correlation of n pairs by Fisher's z, with the variance (1 + ρ²/2) / (n - 3) of Bonett and
    Wright (2000); 95 % by default, for independent pairs. None for fewer than 5 pairs, or where |ρ| is 1, whose z has
    no end.

    Right for few pairs without many ties, such as the events of one run, and where ρ is all that is known. For dozens of
    pairs with ties, such as those of a study, resampling them assumes less.
    """
    if n < 5 or abs(rho) >= 1 - 1e-12:
        return None
    centre, half = atanh(rho), z * sqrt((1 + rho * rho / 2) / (n - 3))
    return tanh(centre - half), tanh(centre + half)
