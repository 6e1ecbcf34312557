"""A few steps of somebody else's trainer on a toy model, with the callback or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from process_toys import changed
from torch import Tensor
from train_toys import WORDS, toy_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from rlspec.io.module import strip_wrappers

Make = Callable[[list[TrainerCallback]], Trainer]
#: Settings of every trainer: quick, quiet, and with each step's loss in the log.
SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
#: What people train with, as settings of any of the trainers.
SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "mixed precision": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "no line of the trainer's own at the steps measured": {"logging_steps": 2},
}


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def examples(count: int = 32, length: int = 8) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, len(WORDS), (count, length), generator=draw).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in tokens]


def plain_trainer(
    folder: Path, callbacks: Sequence[TrainerCallback] = (), model: Any = None, **changes: Any
) -> Trainer:
    """transformers' own, on a model with dropout, so that a random number drawn or not shows in the losses."""
    torch.manual_seed(0)
    model = toy_model(attention_dropout=0.2) if model is None else model
    args = TrainingArguments(output_dir=str(folder), **{**SETTINGS, **changes})
    return Trainer(model=model, args=args, train_dataset=examples(), callbacks=list(callbacks))  # type: ignore[arg-type]


def loop(model: Any, callback: TrainerCallback, first: int = 0, last: int = 4) -> None:
    """What a trainer calls, where several processes may hold the model."""
    number = dist.get_rank() if dist.is_initialized() else 0
    state: Any = SimpleNamespace(global_step=first, max_steps=last, is_world_process_zero=number == 0)
    given: Any = (SimpleNamespace(world_size=2), state, SimpleNamespace())
    callback.on_train_begin(*given, model=model)
    for step in range(first + 1, last + 1):
        changed(model)
        state.global_step = step
        callback.on_step_end(*given, model=model)
    callback.on_train_end(*given, model=model)


def losses(trainer: Trainer) -> list[dict[str, float]]:
    """What the trainer itself logged of each step, times and our own lines left out."""
    return [
        {name: value for name, value in line.items() if "time" not in name and "per_second" not in name}
        for line in trainer.state.log_history
        if not any(name.startswith("spectra/") for name in line) and "train_runtime" not in line
    ]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.model is not None
    return {strip_wrappers(name): tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_training(make: Make, callback: TrainerCallback) -> Trainer:
    """Train without and with the callback: losses, weights and the random state afterwards are equal to the bit."""
    runs = []
    for callbacks in ([], [callback]):
        trainer = make(callbacks)
        trainer.train()
        runs.append((losses(trainer), weights(trainer), torch.get_rng_state()))
    (alone, alone_weights, alone_state), (watched, watched_weights, watched_state) = runs
    assert any("loss" in line for line in alone)
    assert watched == alone
    assert watched_weights.keys() == alone_weights.keys()
    for name, tensor in alone_weights.items():
        assert torch.equal(watched_weights[name], tensor), name
    assert torch.equal(watched_state, alone_state)
    return trainer
