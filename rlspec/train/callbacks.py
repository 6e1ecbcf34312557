"""Hooks of the trainer, and the isolation that keeps them from changing what they watch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rlspec.train.modes import kept_modes


@dataclass(frozen=True)
class StepState:
    """What a callback sees after a step (step 0: before the first).

    Attributes:
        stage: "sft" or "ppo"; "restore" in a run that ends with one.
        step: finished optimizer steps (SFT) or updates (PPO).
        total: steps or updates of the stage.
        model: as it is now; to be read only.
        tokenizer: the model's.
        logs: figures of the step, such as ``loss``; none before the first.
        seconds_training: cumulative, over resumes too, without the callbacks.
    """

    stage: str
    step: int
    total: int
    model: Any
    tokenizer: Any
    logs: dict[str, float]
    seconds_training: float


class Callback:
    """Base class; override what is needed. A callback may read everything and must change no weight.

    Random state and train/eval mode may be used freely: the trainer puts them back.
    """

    def on_start(self, state: StepState) -> None:
        """Before the first step. Not called when a run is continued from a later step."""

    def on_step(self, state: StepState) -> None:
        """After every step."""

    def ends(self) -> bool:
        """Asked after every step: whether the stage ends here, as it would after its last step."""
        return False


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context after which the random state of torch, numpy and Python and the model's modes are as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with kept_modes(model):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def notify(callbacks: Sequence[Callback], state: StepState) -> None:
    """Call every callback for a step, with random state and modes protected."""
    with undisturbed(state.model):
        for callback in callbacks:
            if state.step == 0:
                callback.on_start(state)
            else:
                callback.on_step(state)
