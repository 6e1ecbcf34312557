"""From scores to a recommendation: the trade-off curve, the rule, and intervals over texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlspec.study.repair.candidates import Candidate
from rlspec.study.repair.scores import Costs, Sums
from rlspec.study.statistics import bootstrap, interval


@dataclass(frozen=True)
class Trial:
    candidate: Candidate
    score: Costs


def most_task(base: Costs, tuned: Costs, tolerance: float) -> float:
    """The largest task cost that the rule accepts: the tuned one's and a share of what tuning gained."""
    return tuned.task + tolerance * abs(base.task - tuned.task)


def recommend(trials: Sequence[Trial], base: Costs, tuned: Costs, tolerance: float) -> Trial | None:
    """The trial of least general cost among those within the tolerance; None where none is below the tuned one's.

    The first of equals, so that the answer does not depend on how a search was interrupted.
    """
    limit = most_task(base, tuned, tolerance)
    fit = [trial for trial in trials if trial.score.task <= limit and trial.score.general < tuned.general]
    return min(fit, key=lambda trial: trial.score.general, default=None)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trade-off curve: trials that no other betters in both, by rising general cost."""
    found: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.score.general, trial.score.task)):
        if not found or trial.score.task < found[-1].score.task:
            found.append(trial)
    return found


def share_won_back(score: Costs, base: Costs, tuned: Costs) -> float | None:
    """Of the general score that tuning lost; None where it lost none."""
    lost = tuned.general - base.general
    return (tuned.general - score.general) / lost if lost > 0 else None


def difference_interval(a: Sums, b: Sums, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval, over texts, of the mean token loss in ``a`` less that in ``b``.

    Both are of the same texts, which are drawn in pairs (B. Efron, R. Tibshirani, 1993, chapter 13).
    """
    changes = [(first - second, count) for (first, count), (second, _) in zip(a, b, strict=True)]

    def mean_change(drawn: list[tuple[float, int]]) -> float:
        return sum(change for change, _ in drawn) / sum(count for _, count in drawn)

    return interval(bootstrap(changes, mean_change, seed=seed))
