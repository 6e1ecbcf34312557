"""Checkpoints as ordinary Hugging Face folders, there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rlspec.io.files import sync_folder


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer so that ``from_pretrained(folder)`` loads both.

    Everything goes to a temporary folder beside it, which is renamed when it is complete; an existing
    checkpoint of that name is replaced.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    model.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(temporary, folder)
    sync_folder(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
