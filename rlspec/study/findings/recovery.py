"""How much of the OOD accuracy that SFT lost comes back, by the step that RL starts from, and until when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlspec.study.findings.section import Row

# Shares of less than that many points of accuracy are not told: a small loss divides its own noise.
LEAST_LOSS = 0.05


@dataclass(frozen=True)
class Recovery:
    """Outcomes of one seed on the same n deals: at the peak of SFT, and per step before and after RL."""

    steps: tuple[int, ...]
    peak: NDArray[np.float64]  # (n,)
    before: NDArray[np.float64]  # (steps, n)
    after: NDArray[np.float64]  # (steps, n)


def recoveries(rows: Sequence[Row]) -> list[Recovery]:
    """One for each seed, at the steps that all of them have."""
    found: dict[int, dict[str, dict[int, Row]]] = {}
    for row in rows:
        by_kind = found.setdefault(row["seed"], {"base": {}, "sft": {}, "ppo": {}})
        by_kind[row["what"]][row["sft_step"]] = row
    steps = tuple(sorted(set.intersection(*(set(kinds["ppo"]) for kinds in found.values()))))

    def outcomes(row: Row) -> list[float]:
        return [float(c) for c in row["ood_outcomes"]]

    result = []
    for kinds in found.values():
        peak = max(kinds["sft"].values(), key=lambda row: row["ood"])
        before = np.array([outcomes(kinds["sft"][step]) for step in steps])
        after = np.array([outcomes(kinds["ppo"][step]) for step in steps])
        result.append(Recovery(steps, np.array(outcomes(peak)), before, after))
    return result


def shares(found: Sequence[Recovery]) -> NDArray[np.float64]:
    """(steps,) (after - before) / (peak - before) of the accuracies over all seeds; NaN where too little was lost."""
    before, after = (np.mean([getattr(r, name).mean(-1) for r in found], 0) for name in ("before", "after"))
    lost = np.mean([r.peak.mean() for r in found]) - before
    return np.where(lost >= LEAST_LOSS, (after - before) / np.maximum(lost, LEAST_LOSS), np.nan)


def resampled(found: Sequence[Recovery], draws: int = 1000, seed: int = 0) -> list[list[Recovery]]:
    """Bootstrap replicates: seeds with replacement, and within each its deals, the same ones at every step."""
    rng = np.random.default_rng(seed)
    replicates = []
    for _ in range(draws):
        drawn = []
        for i in rng.integers(len(found), size=len(found)):
            r = found[i]
            deals = rng.integers(len(r.peak), size=len(r.peak))
            drawn.append(Recovery(r.steps, r.peak[deals], r.before[:, deals], r.after[:, deals]))
        replicates.append(drawn)
    return replicates


def crossing(steps: Sequence[int], share: NDArray[np.float64], level: float = 0.5) -> float | None:
    """The step from which the share stays under the level, linear between the steps measured; None if at the last step
    it does not, the first step if it always does."""
    there = [(step, value) for step, value in zip(steps, share) if not np.isnan(value)]
    if not there or there[-1][1] >= level:
        return None
    above = [i for i, (_, value) in enumerate(there) if value >= level]
    if not above:
        return float(there[0][0])
    (x0, y0), (x1, y1) = there[above[-1]], there[above[-1] + 1]
    return float(x0 + (x1 - x0) * (y0 - level) / (y0 - y1))
