"""Evaluations inside a training that neither the trainer's callbacks nor its course hear of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kept_flags(control: Any, trainer: Any) -> Iterator[None]:
    """Context after which the flags of a control, and of the trainer's, are as before.

    Logging and evaluating take the trainer's own wish to do so at this step for fulfilled.
    """
    controls = [control] if trainer is None else [control, trainer.control]
    before = [dict(vars(one)) for one in controls]
    try:
        yield
    finally:
        if trainer is not None:
            trainer.control = controls[1]
        for one, flags in zip(controls, before):
            vars(one).update(flags)


@contextmanager
def unheard(control: Any, trainer: Any) -> Iterator[None]:
    """Context in which ``trainer.evaluate()`` tells no callback and no logger, and leaves no line in the log history.

    Else EarlyStopping would count it, and the progress bar take it for the trainer's own.
    """
    with kept_flags(control, trainer):
        if trainer is None:
            yield
            return
        handler, history = trainer.callback_handler, trainer.state.log_history
        callbacks, lines = handler.callbacks, len(history)
        handler.callbacks = []
        try:
            yield
        finally:
            handler.callbacks = callbacks
            del history[lines:]
