"""The loop that both stages share: steps, callbacks, resume states, and a clean stop on Ctrl-C and SIGTERM."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rlspec.errors import TensorError
from rlspec.signals import handling, interrupt
from rlspec.train.callbacks import Callback, StepState, notify
from rlspec.train.schedule import derived_seed
from rlspec.train.state import (
    Part,
    ResumePoint,
    check_same_settings,
    load_parts,
    read_resume_point,
    write_resume_point,
)


@dataclass(frozen=True)
class TrainResult:
    """What a stage did.

    Attributes:
        losses: one a step, from the first step of the first attempt.
        steps: those that are finished.
        seconds: spent training, over resumes too.
        stopped: by Ctrl-C or SIGTERM, before the last step; what a callback ended was not.
        signal: number of the one that came, be it during the last step.
    """

    losses: list[float]
    steps: int
    seconds: float
    stopped: bool
    signal: int | None = None


class StopRequest:
    """The signal that asked to stop since :func:`stoppable` was entered, if one did."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Context that turns the first Ctrl-C or SIGTERM into a request to stop at the next step boundary.

    A second one interrupts at once. Outside the main thread, where Python allows no signal handlers, it does
    nothing.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise interrupt(number)
        request.signal = number

    with handling(handle, signal.SIGINT, signal.SIGTERM):
        yield request


def run_steps(
    stage: str,
    total: int,
    take_step: Callable[[int], dict[str, float]],
    *,
    config: Any,
    model: Any,
    tokenizer: Any,
    parts: Mapping[str, Part],
    callbacks: Sequence[Callback],
    resume_dir: Path | None,
) -> TrainResult:
    """Take steps 1 … total, or those a resume state says are missing.

    ``take_step(step)`` trains and returns its logs, "loss" among them. ``parts`` are the objects with a
    ``state_dict`` that the trajectory depends on besides the step number; the model is always one of them. A
    resume state is written after the callbacks of its step, every ``config.checkpoint_every`` steps, at the
    end, and on Ctrl-C and SIGTERM.

    Raises:
        TensorError: a loss is not finite.
        RunFolderError: the resume state belongs to other settings.
    """
    parts = {"model": model, **parts}
    settings = asdict(config)
    losses: list[float] = []
    seconds = 0.0
    done = 0
    point = read_resume_point(resume_dir) if resume_dir is not None else None
    fresh = point is None
    if point is not None and resume_dir is not None:
        defaults = {each.name: each.default for each in fields(config)}
        check_same_settings(point, stage, settings, defaults, resume_dir)
        load_parts(point, parts)
        done, losses, seconds = point.step, list(point.losses), point.seconds
    del point  # and with it the mapped file

    def state(logs: dict[str, float]) -> StepState:
        return StepState(stage, done, total, model, tokenizer, logs, seconds)

    def save() -> None:
        if resume_dir is not None:
            states = {name: part.state_dict() for name, part in parts.items()}
            write_resume_point(resume_dir, ResumePoint(stage, done, total, losses, seconds, settings, states))

    saved = done
    with stoppable() as stop:
        if fresh:
            notify(callbacks, state({}))
        ended = False
        while done < total and stop.signal is None and not ended:
            began = time.perf_counter()
            # Dropout is the only user of the global generators; seeding them by step makes it resumable.
            torch.manual_seed(derived_seed(config.seed, stage, done + 1))
            logs = take_step(done + 1)
            if not math.isfinite(logs["loss"]):
                raise TensorError(
                    f"{stage} step {done + 1}: the loss is {logs['loss']}; lower the learning rate"
                )
            done += 1
            losses.append(logs["loss"])
            seconds += time.perf_counter() - began
            notify(callbacks, state(logs))
            ended = any(callback.ends() for callback in callbacks)
            if done % config.checkpoint_every == 0:
                save()
                saved = done
        if saved != done:
            save()
    return TrainResult(losses, done, seconds, stopped=done < total and not ended, signal=stop.signal)
