"""Which metric goes with OOD accuracy: rank correlations over the events of supervised fine-tuning."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
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


def rank_correlations(metrics: Sequence[Row], spectra: Sequence[Row]) -> list[Row]:
    """Spearman's correlation of each metric with OOD accuracy, over the events of SFT after the start.

    Returns:
        Rows of ``metric``, ``spearman``, ``low``, ``high`` (95 % by Fisher's z, which takes events for independent; None
        for fewer than 5) and ``n``, the events; metrics for which the correlation is not defined are left out.
    """
    by_event: dict[Event, list[Row]] = defaultdict(list)
    for row in spectra:
        by_event[event_of(row)].append(row)
    events = [row for row in metrics if row["stage"] == "sft" and row["step"] > 0]
    columns: dict[str, list[float | None]] = {
        name: [_number(row.get(column)) for row in events] for name, column in _RIVALS.items()
    }
    for column in _SPECTRAL:
        columns[column] = [
            mean(_number(row.get(column)) for row in by_event.get(event_of(e), [])) for e in events
        ]
    found = []
    for name, values in columns.items():
        pairs = [
            (value, accuracy)
            for value, row in zip(values, events)
            if value is not None and (accuracy := _number(row.get("ood_accuracy"))) is not None
        ]
        rho = spearman([value for value, _ in pairs], [accuracy for _, accuracy in pairs])
        if rho is not None:
            low, high = spearman_fisher_interval(rho, len(pairs)) or (None, None)
            found.append({"metric": name, "spearman": rho, "low": low, "high": high, "n": len(pairs)})
    return found


def _number(value: Any) -> float | None:
    """A value that can be ranked and summed; a run folder may come from anybody."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e100:
        return None
    return float(value) if math.isfinite(value) else None
