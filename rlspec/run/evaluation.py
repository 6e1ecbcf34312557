"""Evaluations as rows, the paired test between two of them, and both in words."""

from __future__ import annotations

from collections.abc import Sequence

from rlspec.io.jsonl import Row
from rlspec.run.segments import accuracy_prefix
from rlspec.tasks import McNemarResult, mcnemar
from rlspec.train import EvalResult


def eval_row(result: EvalResult, *, turns: int, seed: int) -> Row:
    """An evaluation as a JSON row. ``outcomes`` has one character per deal, in fixed order: 1 is solved."""
    return {
        "shift": result.shift,
        "n": result.n,
        "turns": turns,
        "seed": seed,
        "successes": result.successes,
        "accuracy": result.accuracy,
        "low": result.low,
        "high": result.high,
        "first_turn_accuracy": result.first_turn_accuracy,
        "per_turn_accuracy": result.per_turn_accuracy,
        "kinds": result.kinds,
        "outcomes": "".join("1" if solved else "0" for solved in result.outcomes),
        "seconds": result.seconds,
    }


def metrics_columns(evals: Sequence[Row], ood_shift: str | None) -> Row:
    """The accuracy columns of a metrics row: ``id_*`` (no shift), ``ood_*``, and ``<shift>_*`` for others."""
    columns: Row = {}
    for row in evals:
        prefix = accuracy_prefix(row["shift"], ood_shift)
        for name in ("accuracy", "n", "low", "high", "first_turn_accuracy"):
            columns[f"{prefix}_{name}"] = row[name]
    if ood_shift is not None:
        columns["ood_shift"] = ood_shift
    return columns


def compare_outcomes(before: Row, after: Row) -> McNemarResult:
    """McNemar test of two evaluation rows.

    Raises:
        ValueError: The rows are not of the same deals.
    """
    deals = ("shift", "n", "turns", "seed")
    if any(before[name] != after[name] for name in deals):
        raise ValueError("evaluations of different deals cannot be paired")
    return mcnemar(*([outcome == "1" for outcome in row["outcomes"]] for row in (before, after)))


def paired_test(before: Row, after: Row) -> Row:
    """The McNemar test of two evaluation rows as a JSON value."""
    result = compare_outcomes(before, after)
    return {
        "shift": before["shift"],
        "n": before["n"],
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "gained": result.gained,
        "lost": result.lost,
        "p_value": result.p_value,
    }


def compare_gains(first: tuple[Row, Row], second: tuple[Row, Row]) -> Row:
    """Which of two branches gained more on the same deals, each given by its rows before and after.

    The test is the exact sign test over the deals whose outcome changed otherwise in one branch than in the other.

    Raises:
        ValueError: The rows are not of the same deals.
    """
    for row in (*first, *second):
        compare_outcomes(first[0], row)
    changes = [
        [int(after) - int(before) for before, after in zip(pair[0]["outcomes"], pair[1]["outcomes"])]
        for pair in (first, second)
    ]
    found = mcnemar([a > b for a, b in zip(*changes)], [a < b for a, b in zip(*changes)])
    return {
        "shift": first[0]["shift"],
        "n": first[0]["n"],
        "first_gain": sum(changes[0]) / first[0]["n"],
        "second_gain": sum(changes[1]) / first[0]["n"],
        "more_in_first": found.lost,
        "more_in_second": found.gained,
        "p_value": found.p_value,
    }


def describe_test(test: Row) -> str:
    """A paired test in words."""
    return (
        f"shift {test['shift']}: {test['accuracy_before']:.1%} -> {test['accuracy_after']:.1%} "
        f"({test['gained']} deals gained, {test['lost']} lost, McNemar p = {test['p_value']:.2g})"
    )
