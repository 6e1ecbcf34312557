"""Rank correlations of the metrics of a run with its OOD accuracy."""

from __future__ import annotations

import math
import random

import pytest

from rlspec.run.correlations import rank_correlations, score_correlations
from rlspec.tasks.stats import spearman, spearman_fisher_interval


def events(ood: list[float], angles: list[list[float | None]]) -> tuple[list[dict], list[dict]]:  # type: ignore[type-arg]
    metrics = [
        {"stage": "sft", "step": 10 * i, "ood_accuracy": value, "kl_base_nats_per_token": float(i)}
        for i, value in enumerate(ood)
    ]
    spectra = [
        {"stage": "sft", "step": 10 * i, "angle_left_mean_rad": angle, "nss_k": 1.0}
        for i, matrices in enumerate(angles)
        for angle in matrices
    ]
    return metrics, spectra


def test_each_metric_is_the_mean_over_matrices_at_the_events_after_the_start() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(2)
    ood = [0.9, *(rng.random() for _ in range(8))]
    angles: list[list[float | None]] = [[rng.random(), rng.random(), None] for _ in ood]
    found = {row["metric"]: row for row in rank_correlations(*events(ood, angles))}
    assert set(found) == {"steps", "KL to the base", "angle_left_mean_rad"}  # what does not vary has none
    means = [sum(a for a in pair if a is not None) / 2 for pair in angles]
    for name, values in (("angle_left_mean_rad", means), ("steps", range(9)), ("KL to the base", range(9))):
        truth = stats.spearmanr(list(values)[1:], ood[1:]).statistic
        assert found[name]["spearman"] == pytest.approx(truth, abs=1e-12)
        assert found[name]["n"] == 8 and found[name]["low"] < truth < found[name]["high"]


def test_few_events_have_no_interval_and_odd_values_do_not_count() -> None:
    metrics, spectra = events([0.1, 0.5, 0.3, 0.2], [[1.0], [2.0], [4.0], [3.0]])
    spectra[0]["angle_left_mean_rad"] = spectra[1]["nss_k"] = "much"
    found = rank_correlations(metrics, spectra)
    assert all((row["low"], row["high"], row["n"]) == (None, None, 3) for row in found) and found


def test_the_interval_holds_the_true_correlation_as_often_as_stated() -> None:
    # Of normal pairs with Pearson's r, Spearman's is 6/pi asin(r/2).
    rng, r, n, held = random.Random(3), 0.6, 30, 0
    truth = 6 / math.pi * math.asin(r / 2)
    for _ in range(1500):
        x = [rng.gauss(0, 1) for _ in range(n)]
        y = [r * a + math.sqrt(1 - r * r) * rng.gauss(0, 1) for a in x]
        rho = spearman(x, y)
        assert rho is not None
        found = spearman_fisher_interval(rho, n)
        assert found is not None
        held += found[0] <= truth <= found[1]
    assert 0.93 <= held / 1500 <= 0.97
    assert spearman_fisher_interval(1.0, 30) is None and spearman_fisher_interval(0.5, 4) is None


def test_scores_are_correlated_with_metrics_and_with_what_rivals_them() -> None:
    spectra = [[{"delta_relative": value}, {"delta_relative": value + 2}] for value in (1.0, 2.0, 3.0, 5.0)]
    scores = [{"ood": o, "text_loss": t, "forgetting": t - 1, "kl_base": k} for o, t, k in
              ((0.9, 1.0, 0.1), (0.7, 3.0, 0.3), (0.8, 2.0, 0.2), (0.1, 4.0, 0.9))]  # fmt: skip
    scores[3].pop("ood")
    found = {
        (row["score"], row["metric"]): (row["spearman"], row["n"])
        for row in score_correlations([10, 20, None, 40], spectra, scores)
    }
    assert found == {
        ("ood", "kl_base"): (-1.0, 3), ("ood", "delta_relative"): (-0.5, 3),
        ("text_loss", "kl_base"): (1.0, 4), ("text_loss", "step"): (1.0, 3), ("text_loss", "delta_relative"): (0.8, 4),
    }  # fmt: skip
