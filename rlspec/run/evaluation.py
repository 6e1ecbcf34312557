"""Evaluations as rows and tables, and `rlspec eval`: one checkpoint, or two on the same deals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlspec.backend import choose_device
from rlspec.errors import OptionError
from rlspec.io.files import write_atomically
from rlspec.run.config import TrackConfig
from rlspec.run.jsonl import Row
from rlspec.run.loading import (
    check_checkpoint,
    conversation_needs,
    load_model,
    load_tokenizer,
    model_folder,
)
from rlspec.tasks import McNemarResult, Task, check_shift, get_task, mcnemar
from rlspec.train import EvalResult, evaluate
from rlspec.train.limits import Needs


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
        shift = row["shift"]
        prefix = "id" if shift == "none" else "ood" if shift == ood_shift else shift
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


def _evaluated(
    config: TrackConfig, device: torch.device, folder: Path, tokenizer: Any, task: Task, needs: Needs
) -> list[Row]:
    model = load_model(folder, device).eval()
    needs.check(model, folder, tokenizer, examples=False)
    return _evaluate_shifts(model, tokenizer, task, config)


def evaluate_models(config: TrackConfig, *, compare: str | None = None, json_file: Path | None = None) -> Row:
    """Evaluate ``config.model``, and ``compare`` on the same deals if it is given.

    Returns the figures as they go into ``json_file``: ``evals`` holds one row per model and shift,
    ``tests`` one McNemar test per shift.

    Raises:
        RlspecError: An unknown shift, an unreadable model, or no folder for the file.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise OptionError(f"json_file={str(json_file)!r}: no such folder")
    device = choose_device(config.device)
    names = [config.model] if compare is None else [config.model, compare]
    folders = [model_folder(name) for name in names]
    for folder in folders:
        check_checkpoint(folder)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    result: Row = {"task": config.task, "deals": config.deals, "turns": config.turns, "seed": config.seed}
    prepared = []
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        task = get_task(config.task, tokenizer=tokenizer, turns=config.turns)
        for shift in config.shifts:
            check_shift(task, shift)
        needs = conversation_needs(tokenizer, task, config.shifts, config.deals, config.seed)
        prepared.append((folder, tokenizer, task, needs))
    # Each model is gone before the next is loaded: no name out here holds it.
    by_model = [_evaluated(config, device, *each) for each in prepared]
    result["evals"] = [{"model": name, **row} for name, rows in zip(names, by_model) for row in rows]
    if compare is not None:
        result["tests"] = [paired_test(before, after) for before, after in zip(*by_model)]
    if json_file is not None:
        write_atomically(json_file, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _evaluate_shifts(model: Any, tokenizer: Any, task: Any, config: TrackConfig) -> list[Row]:
    rows = []
    for shift in config.shifts:
        result = evaluate(
            model,
            tokenizer,
            task,
            shift=shift,
            deals=config.deals,
            turns=config.turns,
            seed=config.seed,
            dtype=config.dtype,
        )
        rows.append(eval_row(result, turns=config.turns, seed=config.seed))
    return rows


def evaluation_lines(result: Row) -> list[str]:
    """The table that `rlspec eval` prints."""
    width = max(len(row["model"]) for row in result["evals"])
    lines = [f"{'model':<{width}}  shift   solved    accuracy  95 % interval     first turn"]
    for row in result["evals"]:
        interval = f"{row['low']:>6.1%} to {row['high']:>6.1%}"
        lines.append(
            f"{row['model']:<{width}}  {row['shift']:<6}  {row['successes']:>4}/{row['n']:<4} "
            f"{row['accuracy']:>8.1%}  {interval}  {row['first_turn_accuracy']:>10.1%}"
        )
    lines += [describe_test(test) for test in result.get("tests", ())]
    return lines


def describe_test(test: Row) -> str:
    """A paired test in words."""
    return (
        f"shift {test['shift']}: {test['accuracy_before']:.1%} -> {test['accuracy_after']:.1%} "
        f"({test['gained']} deals gained, {test['lost']} lost, McNemar p = {test['p_value']:.2g})"
    )
