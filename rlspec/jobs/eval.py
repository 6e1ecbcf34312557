"""`rlspec eval`: success rates of one checkpoint, or of two on the same deals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlspec.backend import choose_device
from rlspec.errors import OptionError
from rlspec.io.files import write_atomically
from rlspec.io.jsonl import Row
from rlspec.jobs.loading import (
    check_checkpoint,
    conversation_needs,
    load_model,
    load_tokenizer,
    model_folder,
)
from rlspec.run.config import TrackConfig
from rlspec.run.evaluation import describe_test, eval_row, paired_test
from rlspec.tasks import Task, check_shift, get_task
from rlspec.train import evaluate
from rlspec.train.limits import Needs


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
