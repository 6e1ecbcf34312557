"""The trainer that a callback is in: which one it is, and its own loggers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from rlspec.integrations.unheard import kept_flags
from rlspec.io.jsonl import Row
from rlspec.run.rows import mean

#: What the trainer's own loggers get: name there -> column whose mean over the matrices it is.
LOGGED = {
    "spectra/rotation_left_rad": "angle_left_mean_rad",
    "spectra/rotation_right_rad": "angle_right_mean_rad",
    "spectra/sigma_change_rel": "sigma_change_rel_mean",
    "spectra/delta_relative": "delta_relative",
}


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer that is calling this callback; None where something else is.

    A trainer hands its callbacks everything but itself, and only it knows its loggers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def log_event(trainer: Trainer, control: Any, rows: Sequence[Row], scores: Mapping[str, float]) -> None:
    """Hand the trainer's loggers the means of :data:`LOGGED`, and the scores as ``spectra/score/<name>``."""
    means = {name: mean(row[column] for row in rows) for name, column in LOGGED.items()}
    logs = {name: value for name, value in means.items() if value is not None}
    logs |= {f"spectra/score/{name}": value for name, value in scores.items()}
    # The base class's: those of TRL would add the averages that they gather for their own next line, and begin anew.
    with kept_flags(control, trainer):
        Trainer.log(trainer, logs)
