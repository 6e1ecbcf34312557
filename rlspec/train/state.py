"""Resume state of a training stage: one file, replaced atomically, readable without running any code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlspec.errors import CheckpointError, RunFolderError
from rlspec.io.files import replacing

FILE_NAME = "resume.pt"
FORMAT = 1
# Settings that may differ between a run and its continuation without changing any loss.
FREE_SETTINGS = frozenset({"checkpoint_every"})

Part = nn.Module | torch.optim.Optimizer


@dataclass(frozen=True)
class ResumePoint:
    """Where a stage stands. Data, learning rates and random numbers are functions of the step.

    Attributes:
        stage: "sft" or "ppo".
        step: finished steps.
        total: steps of the stage.
        losses: one a step.
        seconds: spent training so far.
        settings: those of the stage, by name.
        parts: state_dicts by name: "model", "optimizer", …
    """

    stage: str
    step: int
    total: int
    losses: list[float]
    seconds: float
    settings: dict[str, Any]
    parts: dict[str, Any]


def write_resume_point(folder: Path, point: ResumePoint) -> None:
    """Replace the folder's resume state. A kill at any moment leaves the old state or the new one, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE_NAME) as temporary:
        torch.save({"format": FORMAT, **vars(point)}, temporary)


def read_resume_point(folder: Path) -> ResumePoint | None:
    """The folder's resume state, or None if there is none. Its tensors are on the CPU and map the file: they take
    memory as they are touched, and keep the file on disk as long as they live.

    Raises:
        CheckpointError: the file is not a resume state, or one of another format.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = content.pop("format")
    except Exception as error:
        # torch.load raises half a dozen unrelated types for a damaged file.
        raise CheckpointError(
            f"{path}: not a readable resume state ({error}); delete it to restart"
        ) from error
    if found != FORMAT:
        raise CheckpointError(f"{path}: resume state of format {found}, this version reads {FORMAT}")
    return ResumePoint(**content)


def resume_step(folder: Path) -> int | None:
    """The finished steps of the folder's resume state, or None if there is none.

    Raises:
        CheckpointError: as :func:`read_resume_point`.
    """
    point = read_resume_point(folder)
    return None if point is None else point.step


def load_parts(point: ResumePoint, parts: Mapping[str, Part]) -> None:
    """Give each part its state; nothing of the part refers to the file afterwards."""
    for name, part in parts.items():
        part.load_state_dict(point.parts[name])
        if isinstance(part, torch.optim.Optimizer):
            # Modules copy what they are given, optimizers keep it.
            for values in part.state.values():
                values.update({key: v.clone() for key, v in values.items() if _on_cpu(v)})


def _on_cpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def remove_resume_point(folder: Path) -> None:
    """Delete the folder's resume state, and the folder unless it holds something else."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def check_same_settings(
    point: ResumePoint, stage: str, settings: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path
) -> None:
    """Refuse to continue a stage under settings that would change its trajectory.

    Args:
        defaults: what a setting was, in effect, that the state is too old to know.

    Raises:
        RunFolderError: naming the first setting that differs.
    """
    if point.stage != stage:
        raise RunFolderError(f"{folder}: holds the state of stage {point.stage!r}, not of {stage!r}")
    for name, value in settings.items():
        before = point.settings.get(name, defaults.get(name))
        if name not in FREE_SETTINGS and before != value:
            raise RunFolderError(
                f"{folder}: was begun with {name} = {before!r}, cannot continue with {value!r}"
            )
