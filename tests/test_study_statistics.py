"""Statistics of studies against scipy and closed forms."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from rlspec.study.statistics import (
    auc,
    auc_interval,
    bootstrap,
    holm,
    interval,
    spearman_interval,
)


def test_the_interval_of_a_mean_is_scipys() -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(size=40)
    ours = interval(bootstrap(list(sample), lambda drawn: sum(drawn) / len(drawn), draws=4000))
    theirs = stats.bootstrap(
        (sample,), np.mean, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


def test_holm_steps_down_and_never_falls() -> None:
    # By hand: 3 x 0.01 = 0.03, 2 x 0.03 = 0.06, and 0.04 may not fall below that.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_auc_is_mann_whitneys_share_of_pairs() -> None:
    rng = random.Random(1)
    scores = [float(rng.randrange(6)) for _ in range(30)]  # with ties
    positive = [rng.random() < 0.4 for _ in scores]
    yes = [s for s, p in zip(scores, positive) if p]
    no = [s for s, p in zip(scores, positive) if not p]
    expected = stats.mannwhitneyu(yes, no).statistic / (len(yes) * len(no))
    assert auc(scores, positive) == pytest.approx(expected, rel=1e-14)
    assert auc(scores, [True] * 30) is None and auc_interval(scores, [True] * 30) is None


def test_intervals_hold_the_truth_and_shrink_with_the_sample() -> None:
    def width(n: int) -> float:
        rng = random.Random(n)
        x = [rng.gauss(0, 1) for _ in range(n)]
        y = [value + rng.gauss(0, 1) for value in x]
        found = spearman_interval(x, y)
        assert found is not None
        low, high = found
        assert (
            low < 6 / np.pi * np.arcsin(0.5**0.5 / 2) < high
        )  # Spearman's of a Gaussian of correlation 1/sqrt(2)
        return high - low

    assert width(200) < 0.6 * width(30)
    assert spearman_interval([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]) is None
