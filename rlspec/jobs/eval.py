"""`rlspec eval`: success rates of one checkpoint, or of two on the same deals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlspec.backend import choose_device
from rlspec.errors import OptionError, RunFolderError
from rlspec.io.files import write_atomically
from rlspec.io.jsonl import Row
from rlspec.jobs.loading import (
    check_checkpoint,
    conversation_needs,
    evaluation_keys,
    load_model,
    load_tokenizer,
    model_folder,
)
from rlspec.run.config import TrackConfig
from rlspec.run.evaluation import describe_test, eval_row, paired_test
from rlspec.run.folder import RunFolder
from rlspec.tasks import Task, check_shift, evaluation_problems, get_task
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
    ``tests`` one McNemar test per shift, ``not_held_out`` how many problems of a model and a shift were not kept from
    the training of the run that the model is a checkpoint of, where there are some.

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
    result["not_held_out"] = [
        {"model": name, "shift": shift, "problems": problems}
        for name, (folder, _, task, _) in zip(names, prepared)
        for shift, problems in _not_held_out(folder, task, config).items()
    ]
    # Each model is gone before the next is loaded: no name out here holds it.
    by_model = [_evaluated(config, device, *each) for each in prepared]
    result["evals"] = [{"model": name, **row} for name, rows in zip(names, by_model) for row in rows]
    if compare is not None:
        result["tests"] = [paired_test(before, after) for before, after in zip(*by_model)]
    if json_file is not None:
        write_atomically(json_file, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _not_held_out(folder: Path, task: Task, config: TrackConfig) -> dict[str, int]:
    """By shift: problems that the training of a run's checkpoint may have seen, as it kept others from it."""
    run = RunFolder(folder.resolve().parent.parent)
    try:
        settings = run.settings()
        trained = settings["task"], settings["shifts"], int(settings["deals"]), int(settings["seed"])
        if trained[0] != config.task or folder.resolve().parent != run.path / "checkpoints":
            return {}
        kept = evaluation_keys(task, *trained[1:])
    except (RunFolderError, KeyError, TypeError, ValueError):  # no run of ours
        return {}
    counts = {
        shift: sum(
            problem.key not in kept
            for problem in evaluation_problems(task, config.deals, shift=shift, seed=config.seed)
        )
        for shift in config.shifts
    }
    return {shift: count for shift, count in counts.items() if count}


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
    lines += [
        f"{seen['problems']} of these {result['deals']} problems of {seen['shift']} were not kept from the training of "
        f"{seen['model']}: a run holds out those of its own shifts, deals and seed"
        for seen in result["not_held_out"]
    ]
    return lines
