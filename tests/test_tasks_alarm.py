"""The alarm against scipy's tests, and how often it rings where nothing changes."""

from __future__ import annotations

import random

import pytest

from rlspec.errors import OptionError
from rlspec.tasks import alarm as alarms
from rlspec.tasks.alarm import Alarm, Fall, binomial_tail, fall_p_value, fisher_tail, paired_t_tail
from rlspec.tasks.scores import Score, read_scores


def score(results: list[float]) -> Score:
    return read_scores({"x": results}, "test")["x"]


def test_the_one_sided_tests_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    for _ in range(40):
        n, m = rng.randint(1, 300), rng.randint(1, 300)
        k, j = rng.randint(0, n), rng.randint(0, m)
        assert binomial_tail(k, n) == pytest.approx(
            stats.binomtest(k, n, alternative="greater").pvalue, rel=1e-9
        )
        table = [[k, n - k], [j, m - j]]
        assert fisher_tail(k, n, j, m) == pytest.approx(
            stats.fisher_exact(table, alternative="greater").pvalue, rel=1e-7
        )
        differences = [rng.gauss(0.1, 1) for _ in range(rng.randint(2, 60))]
        truth = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
        assert paired_t_tail(differences) == pytest.approx(truth, rel=1e-9, abs=1e-14)
    assert paired_t_tail([0.5, 0.5]) is None


def test_what_got_better_is_no_fall_and_directions_follow_the_name() -> None:
    low, high = score([0.0] * 30 + [1.0] * 2), score([1.0] * 30 + [0.0] * 2)
    assert fall_p_value(high, low) == binomial_tail(30, 32)
    assert fall_p_value(low, high) == binomial_tail(2, 32)
    better, worse = score([1.0, 2.0, 3.1]), score([2.0, 3.0, 4.2])
    assert fall_p_value(better, worse, lower=True) < 0.01 < 0.9 < fall_p_value(worse, better, lower=True)  # type: ignore[operator]
    watch = Alarm("retain_loss")
    texts = random.Random(1)
    start = [texts.gauss(3, 1) for _ in range(50)]
    assert watch.observe(0, score(start)) is None
    assert watch.observe(10, score([loss - 0.1 - 0.01 * texts.random() for loss in start])) is None
    found = watch.observe(20, score([loss + 0.2 + 0.01 * texts.random() for loss in start]))
    assert found is not None and (found.peak_step, found.step) == (10, 20)


def test_a_fall_names_the_step_of_the_peak_also_from_counts_alone() -> None:
    watch = Alarm("ood")
    falls = [watch.observe(step, Score(value, 234)) for step, value in ((0, 0.19), (50, 0.547), (100, 0.034))]
    assert falls[:2] == [None, None]
    assert falls[2] is not None
    p = alarms.correction(2) * fisher_tail(128, 234, 8, 234)
    assert falls[2] == Fall("ood", 50, 0.547, 100, 0.034, p)


def test_a_mere_number_is_never_tested_and_other_problems_are_refused() -> None:
    watch = Alarm("ood")
    assert [watch.observe(step, Score(value)) for step, value in ((0, 0.9), (1, 0.1))] == [None, None]
    watch = Alarm("ood")
    watch.observe(0, Score(0.9, 10))
    with pytest.raises(OptionError, match="n=20 at step 1, 10 before"):
        watch.observe(1, Score(0.9, 20))


def test_the_weights_of_all_tests_of_a_training_add_up_to_one() -> None:
    # Event m + 1 spends level / correction(m) on each of its m candidates.
    assert sum(m / alarms.correction(m) for m in range(1, 10_000)) == pytest.approx(1, abs=2e-4)
    assert all(alarms.correction(m + 1) > alarms.correction(m) for m in range(1, 50))


def false_alarms(draw: str, trainings: int = 2000, events: int = 20) -> float:
    """Share of trainings with an alarm in which nothing changes but the luck of each evaluation."""
    rng, rung = random.Random(5), 0
    for _ in range(trainings):
        watch = Alarm("loss" if draw == "losses" else "ood")
        texts = [rng.gauss(3, 1) for _ in range(40)]
        falls = []
        for step in range(events):
            if draw == "losses":
                found = score([text + rng.gauss(0, 0.1) for text in texts])
            else:
                solved = [float(rng.random() < 0.5) for _ in range(60)]
                found = score(solved) if draw == "deals" else Score(sum(solved) / 60, 60)
            falls.append(watch.observe(step, found))
        rung += any(falls)
    return rung / trainings


@pytest.mark.parametrize("draw", ["deals", "counts", "losses"])
def test_a_training_without_change_rings_at_most_as_often_as_stated(draw: str) -> None:
    assert false_alarms(draw) <= alarms.LEVEL


@pytest.mark.parametrize("draw", ["deals", "losses"])
def test_an_alarm_that_forgets_how_often_it_tests_rings_far_more_often(
    draw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "correction", lambda earlier: 1)
    assert false_alarms(draw, trainings=200) > 4 * alarms.LEVEL


def test_scores_of_other_kinds_are_refused_by_name() -> None:
    assert read_scores({"a": 0.5, "b": [True, False], "c": {"value": 1, "n": 3}}, "evaluate") == {
        "a": Score(0.5),
        "b": Score(0.5, 2, (1.0, 0.0)),
        "c": Score(1.0, 3),
    }
    for given, told in [
        (0.5, "gave float"),
        ({}, "gave dict"),
        ({"a": float("nan")}, "score 'a' is nan"),
        ({"a": "0.5"}, "score 'a' is '0.5'"),
        ({"a": []}, "score 'a' is an empty list"),
        ({"a": {"value": 1, "n": 0}}, "score 'a' has n=0"),
    ]:
        with pytest.raises(OptionError, match=told):
            read_scores(given, "evaluate")
