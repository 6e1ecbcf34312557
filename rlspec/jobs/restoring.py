"""The stage of `rlspec track` that trains nothing: singular directions of the run's start go back into the end of SFT."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rlspec.restore import restore_
from rlspec.spectra import SpectralBasis
from rlspec.train import Callback, StepState, TrainResult
from rlspec.train.callbacks import notify
from rlspec.train.loop import stoppable


@dataclass(frozen=True)
class Restoration:
    """What is put back: the leading directions of some matrices of a checkpoint."""

    base: Path
    modules: tuple[str, ...]
    rank: str


def restore_stage(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    settings: Restoration,
    *,
    callbacks: Sequence[Callback],
    **_: Any,
) -> TrainResult:
    """Restore a model in place, with the arguments, callbacks and result of a trainer's stage of one step.

    It is too short to be continued: interrupted, it is done anew from the weights that it starts from.

    Raises:
        TensorError, ProjectionError: those of :func:`rlspec.restore_`.
    """

    def state(step: int, seconds: float) -> StepState:
        return StepState("restore", step, 1, model, tokenizer, {}, seconds)

    with stoppable() as stop:
        notify(callbacks, state(0, 0.0))
        if stop.signal is not None:
            return TrainResult([], 0, 0.0, stopped=True, signal=stop.signal)
        began = time.perf_counter()
        device = next(model.parameters()).device
        basis = SpectralBasis.from_checkpoint(
            settings.base, modules=settings.modules, rank=settings.rank, device=device
        )
        restore_(model, basis)
        seconds = time.perf_counter() - began
        notify(callbacks, state(1, seconds))
    return TrainResult([], 1, seconds, stopped=False, signal=stop.signal)
