"""Wilson interval and McNemar test against scipy."""

from __future__ import annotations

import random

import pytest

from rlspec.tasks import mcnemar, wilson_interval

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 234), (234, 234), (17, 234), (117, 234), (3, 7)]
)
def test_wilson_agrees_with_scipy(successes: int, n: int) -> None:
    peer = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((peer.low, peer.high), abs=1e-12)


def test_wilson_refuses_what_is_no_proportion() -> None:
    for successes, n in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="no proportion"):
            wilson_interval(successes, n)


def test_mcnemar_agrees_with_the_binomial_test() -> None:
    rng = random.Random(0)
    for _ in range(50):
        n = rng.randint(1, 400)
        before = [rng.random() < 0.5 for _ in range(n)]
        after = [b if rng.random() < 0.7 else rng.random() < 0.6 for b in before]
        result = mcnemar(before, after)
        discordant = result.gained + result.lost
        expected = stats.binomtest(result.gained, discordant).pvalue if discordant else 1.0
        assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_known_case() -> None:
    before = [True] * 10 + [False] * 2 + [True] * 30
    after = [False] * 10 + [True] * 2 + [True] * 30
    result = mcnemar(before, after)
    assert (result.gained, result.lost) == (2, 10)
    assert result.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        mcnemar([True], [True, False])
