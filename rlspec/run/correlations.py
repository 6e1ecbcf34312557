"""Which metric goes with a score: rank correlations over the events of a training, or over checkpoints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rlspec.io.jsonl import Row
from rlspec.run.rows import mean
from rlspec.run.segments import Event, event_of
from rlspec.tasks.stats import spearman, spearman_fisher_interval

# Columns of the metrics rows, by their name in the table.
_RIVALS = {"KL to the base": "kl_base_nats_per_token", "steps": "step"}
# Columns of the spectra rows, whose means over matrices are taken.
_SPECTRAL = (
    "angle_left_mean_rad",
    "angle_right_mean_rad",
    "angle_left_max_rad",
    "angle_right_max_rad",
    "projector_distance_left",
    "projector_distance_right",
    "best_match_left_mean",
    "best_match_right_mean",
    "best_match_left_min",
    "best_match_right_min",
    "sigma_change_rel_mean",
    "sigma_change_rel_max",
    "nss_k",
    "delta_frobenius",
    "delta_relative",
    "stable_rank",
    "delta_stable_rank",
    "effective_rank",
    "rho_k",
    "energy_diagonal",
    "energy_offdiagonal",
    "update_sparsity",
    "intruder_dimensions",
    "intruder_energy",
)


#: Scores that rival the spectra in telling the others (RL's Razor, arXiv 2509.04259).
RIVAL_SCORES = ("kl_base",)


def rank_correlations(metrics: Sequence[Row], spectra: Sequence[Row]) -> list[Row]:
    """Spearman's correlation of each metric with OOD accuracy, over the events of SFT after the start.

    Returns:
        Rows of :func:`correlated`.
    """
    by_event: dict[Event, list[Row]] = defaultdict(list)
    for row in spectra:
        by_event[event_of(row)].append(row)
    events = [row for row in metrics if row["stage"] == "sft" and row["step"] > 0]
    columns = {name: [_number(row.get(column)) for row in events] for name, column in _RIVALS.items()}
    columns |= _means([by_event.get(event_of(event), []) for event in events])
    return correlated(columns, [_number(row.get("ood_accuracy")) for row in events])


def score_correlations(
    steps: Sequence[int | None], spectra: Sequence[Sequence[Row]], scores: Sequence[Mapping[str, float]]
) -> list[Row]:
    """Spearman's correlation of each metric with each score over checkpoints, all of one base.

    Args:
        steps, spectra, scores: of each checkpoint its step, its matrices' rows, and name -> score. ``kl_base`` is a
            metric that the other scores are compared with.

    Returns:
        Rows of ``score`` and of :func:`correlated`, in the order of the scores.
    """
    names = dict.fromkeys(name for row in scores for name in row)
    columns = {name: [_number(row.get(name)) for row in scores] for name in RIVAL_SCORES if name in names}
    columns["step"] = [_number(step) for step in steps]
    columns |= _means(spectra)
    return [
        {"score": name, **row}
        for name in names
        # Forgetting is text_loss less a constant, and goes with the same.
        if name not in RIVAL_SCORES and not (name == "forgetting" and "text_loss" in names)
        for row in correlated(columns, [_number(row.get(name)) for row in scores])
    ]


def correlated(columns: Mapping[str, Sequence[float | None]], target: Sequence[float | None]) -> list[Row]:
    """Spearman's correlation of each column with the target, over the places where both are numbers.

    Returns:
        Rows of ``metric``, ``spearman``, ``low``, ``high`` (95 % by Fisher's z, which takes places for independent; None
        for fewer than 5) and ``n``, the places; metrics for which the correlation is not defined are left out.
    """
    found = []
    for name, values in columns.items():
        pairs = [(x, y) for x, y in zip(values, target, strict=True) if x is not None and y is not None]
        rho = spearman([x for x, _ in pairs], [y for _, y in pairs])
        if rho is not None:
            low, high = spearman_fisher_interval(rho, len(pairs)) or (None, None)
            found.append({"metric": name, "spearman": rho, "low": low, "high": high, "n": len(pairs)})
    return found


def _means(groups: Sequence[Sequence[Row]]) -> dict[str, list[float | None]]:
    """The means of each spectral column over the matrices of each group."""
    return {
        column: [mean(_number(row.get(column)) for row in rows) for rows in groups] for column in _SPECTRAL
    }


def _number(value: Any) -> float | None:
    """A value that can be ranked and summed; a run folder may come from anybody."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e100:
        return None
    return float(value) if math.isfinite(value) else None
