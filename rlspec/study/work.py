"""Doing one cell: train, restore or take the weights as they are, measure, and write the result at once."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from rlspec.io.lock import let_go, take_lock
from rlspec.jobs.loading import load_model
from rlspec.signals import interrupt
from rlspec.study.cells import Cell
from rlspec.study.context import Context, context_of
from rlspec.study.folder import StudyFolder
from rlspec.study.measure import accuracies, confidence, distances
from rlspec.study.repairs import restored
from rlspec.train import (
    Callback,
    PPOConfig,
    SFTConfig,
    StepState,
    TrainResult,
    save_checkpoint,
    train_ppo,
    train_sft,
)
from rlspec.train.sft import sft_batch
from rlspec.train.state import remove_resume_point

Row = dict[str, Any]


def run_cell(path: Path | str, digest: str, threads: int) -> None:
    """Do a cell of the study in a folder, unless it is finished.

    Where another process is at it, which then was started by a study that is no more, its end is waited for.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; training goes on from its last state when the cell is run again.
    """
    folder = StudyFolder(path)
    cell = next(cell for cell in folder.study().cells if cell.digest == digest)
    folder.cell(digest).mkdir(parents=True, exist_ok=True)
    told = f"{folder.cell(digest)}: waiting for a process that an earlier run of this study left at work"
    lock = take_lock(folder.cell(digest), on_wait=lambda: print(told, file=sys.stderr, flush=True))
    try:
        if folder.finished(digest):
            return
        torch.set_num_threads(threads)
        began = time.perf_counter()
        result = _RUN[cell.work](folder, cell, context_of(cell.settings))
        folder.finish(digest, result, time.perf_counter() - began)
        remove_resume_point(folder.cell(digest) / "resume")
    finally:
        let_go(lock)


def _start(folder: StudyFolder, cell: Cell, context: Context) -> Any:
    """The weights that a cell starts from, to be changed at will."""
    if cell.parent is None:
        return load_model(context.folder, context.device)
    assert cell.step is not None
    return load_model(folder.checkpoint(cell.parent, cell.step), context.device)


class _Keep(Callback):
    """Leaves a checkpoint at some steps."""

    def __init__(self, folder: StudyFolder, digest: str, steps: list[int]) -> None:
        self.folder, self.digest, self.steps = folder, digest, steps

    def on_step(self, state: StepState) -> None:
        if state.step in self.steps:
            target = self.folder.checkpoint(self.digest, state.step)
            save_checkpoint(state.model, state.tokenizer, target, overwrite=target.exists())


def _sft(folder: StudyFolder, cell: Cell, context: Context) -> Row:
    settings = cell.settings
    config = SFTConfig(**settings["sft"])
    task = context.task(many_rules=settings["many_rules"])
    result = train_sft(
        _start(folder, cell, context),
        context.tokenizer,
        task,
        config,
        reference=context.base if config.kl_coef > 0 else None,
        exclude=context.exclude,
        callbacks=[_Keep(folder, cell.digest, settings["keep"])],
        resume_dir=folder.cell(cell.digest) / "resume",
    )
    _stop_if_asked(result)
    lengths = [
        sum(len(prompt) + len(answer) for prompt, answer in pairs)
        for step in range(1, config.steps + 1)
        for pairs in [sft_batch(context.tokenizer, task, config, step, context.exclude)]
    ]
    return {"losses": result.losses, "tokens": lengths}


def _ppo(folder: StudyFolder, cell: Cell, context: Context) -> Row:
    model = _start(folder, cell, context)
    result = train_ppo(
        model,
        context.tokenizer,
        context.task(),
        PPOConfig(**cell.settings["ppo"]),
        exclude=context.exclude,
        resume_dir=folder.cell(cell.digest) / "resume",
    )
    _stop_if_asked(result)
    # Loaded anew: a continued cell trains from later weights.
    before = dict(_start(folder, cell, context).named_parameters())
    row = _measured(context, model, full=True)
    return {**row, "cosine_back": _cosine_back(context, before, model)}


def _restore(folder: StudyFolder, cell: Cell, context: Context) -> Row:
    model = _start(folder, cell, context)
    change = restored(context, model, cell.settings["restore"])
    return {**_measured(context, model, full=False), "change_relative": change}


def _measure(folder: StudyFolder, cell: Cell, context: Context) -> Row:
    return _measured(context, _start(folder, cell, context), full=cell.settings["full"])


_RUN = {"sft": _sft, "ppo": _ppo, "restore": _restore, "measure": _measure}


def _measured(context: Context, model: Any, *, full: bool) -> Row:
    row = accuracies(context, model)
    return {**row, **distances(context, model), **confidence(context, model)} if full else row


def _stop_if_asked(result: TrainResult) -> None:
    if result.signal is not None:
        raise interrupt(result.signal)


def _cosine_back(context: Context, before: dict[str, torch.Tensor], model: Any) -> float | None:
    """Cosine between what training changed and the way from where it began back to the base, over all weights
    together: 1 is straight back, 0 neither back nor further, negative further; None where either is nothing."""
    base = dict(context.base.named_parameters())
    dot = moved = way = 0.0
    for name, parameter in model.named_parameters():
        start = before[name].detach().double()
        step, back = parameter.detach().double() - start, base[name].detach().double() - start
        dot += (step * back).sum().item()
        moved += step.square().sum().item()
        way += back.square().sum().item()
    return dot / (moved * way) ** 0.5 if moved > 0 and way > 0 else None
