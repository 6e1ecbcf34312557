"""Checkpoints as ordinary Hugging Face folders, there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlspec.io.files import give_usual_modes
from rlspec.io.replaced import refuse_losses
from rlspec.io.staging import Staging


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    folder: Path | str,
    *,
    overwrite: bool = False,
    on_complete: Callable[[Path], None] = lambda content: None,
) -> None:
    """Write model and tokenizer so that ``from_pretrained(folder)`` loads both.

    Everything goes to a hidden folder beside it, which gets the name when it is complete.

    Args:
        overwrite: ``folder`` may exist and hold a checkpoint, which is replaced in one step.
        on_complete: called with the complete folder before that.

    Raises:
        CheckpointError: ``folder`` exists and is not to be overwritten, holds more than a checkpoint, or cannot be
            written.
    """
    if overwrite and os.path.lexists(folder):
        refuse_losses(Path(folder))
    staging = Staging(Path(folder), "", resume=False, overwrite=overwrite)
    try:
        model.save_pretrained(staging.checkpoint, safe_serialization=True)
        tokenizer.save_pretrained(staging.checkpoint)
        give_usual_modes(staging.checkpoint)
        for path in staging.checkpoint.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        on_complete(staging.checkpoint)
        staging.publish()
    except BaseException:
        staging.close(keep=False)  # not the whole folder: the old checkpoint lies there between two renames
        raise
    finally:
        staging.unlock()
