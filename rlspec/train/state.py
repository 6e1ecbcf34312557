"""Resume state of a training stage: one file, replaced atomically, readable without running any code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlspec.errors import CheckpointError, RunFolderError
from rlspec.io.files import replacing

FILE_NAME = "resume.pt"
FORMAT = 1
# Settings that may differ between a run and its continuation without changing any loss.
FREE_SETTINGS = frozenset({"checkpoint_every"})


@dataclass(frozen=True)
class ResumePoint:
    """Where a stage stands. Data, learning rates and random numbers are functions of the step."""

    stage: str
    step: int  # finished steps
    total: int
    losses: list[float]
    seconds: float  # spent training so far
    settings: dict[str, Any]
    parts: dict[str, Any]  # state_dicts by name: "model", "optimizer", …


def write_resume_point(folder: Path, point: ResumePoint) -> None:
    """Replace the folder's resume state. A kill at any moment leaves the old state or the new one, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE_NAME) as temporary:
        torch.save({"format": FORMAT, **vars(point)}, temporary)


def read_resume_point(folder: Path, *, mapped: bool = False) -> ResumePoint | None:
    """The folder's resume state on the CPU, or None if there is none.

    ``mapped`` leaves the tensors on disk until they are touched: for a look at the step and the losses.

    Raises:
        CheckpointError: the file is not a resume state, or one of another format.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        found = content.pop("format")
    except Exception as error:
        # torch.load raises half a dozen unrelated types for a damaged file.
        raise CheckpointError(
            f"{path}: not a readable resume state ({error}); delete it to restart"
        ) from error
    if found != FORMAT:
        raise CheckpointError(f"{path}: resume state of format {found}, this version reads {FORMAT}")
    return ResumePoint(**content)


def check_same_settings(point: ResumePoint, stage: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a stage under settings that would change its trajectory.

    Raises:
        RunFolderError: naming the first setting that differs.
    """
    if point.stage != stage:
        raise RunFolderError(f"{folder}: holds the state of stage {point.stage!r}, not of {stage!r}")
    for name, value in settings.items():
        before = point.settings.get(name)
        if name not in FREE_SETTINGS and before != value:
            raise RunFolderError(
                f"{folder}: was begun with {name} = {before!r}, cannot continue with {value!r}"
            )
