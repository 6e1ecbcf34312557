"""A run is a tree: a trunk, and branches that start from the weights of one of its steps.

Rows of runs from before there were branches carry no segment; there each stage was one, and gave it its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = tuple[str, int]  # id of a segment, step within it

#: what changes the weights of a segment, in the order of a run
STAGES = ("sft", "ppo", "restore")
#: a checkpoint's step at the end of its name, after a separator or such a word: checkpoint-500, sft-300, step500
STEP_LAST = re.compile(r"(?:(.*?)[-_.=]|.*(?:step|iter|checkpoint|ckpt|epoch))(\d{1,18})", re.IGNORECASE)
#: a checkpoint's step before other words of its name, as in checkpoint-10-merged or step_000500_hf; Llama-3-8B has none
STEP_INSIDE = re.compile(
    r".*(?<![a-z])(?:global)?(?:step|iter|checkpoint|ckpt|epoch)[-_.=]?(\d{1,18})[-_.][a-z][^/]*",
    re.IGNORECASE,
)
_BRANCH = re.compile(r"ppo-from-(\d{1,18})")


@dataclass(frozen=True)
class Segment:
    """Steps of one stage in a row, from one set of weights."""

    id: str  # names its checkpoints and array files: <id>-<step>
    stage: str  # what changes the weights: "sft", "ppo" or "restore"
    steps: int
    parent: Event | None = None  # whose weights it starts from; None: the model that the run was given
    method: str = ""  # of training, where the stage's name does not say it: see method_of

    @property
    def end(self) -> Event:
        return self.id, self.steps


def method_of(stage: str, settings: Mapping[str, Any]) -> str:
    """What a stage of a run with these settings was trained by, where that is not what the stage is called.

    ``ppo`` is GRPO or RLOO where returns are held against the group's (``advantages``), and GRPO by TRL's trainers.
    """
    if stage == "restore":
        return "restoration"
    if stage != "ppo":
        return ""
    advantages = "grpo" if settings.get("trainer") == "trl" else settings.get("advantages")
    return str(advantages).upper() if advantages in ("grpo", "rloo") else ""


def branch_id(step: int) -> str:
    """What a branch of PPO is called that starts from an SFT step, where a run has several."""
    return f"ppo-from-{step}"


def branch_origin(name: str) -> int | None:
    """The SFT step that a branch is called after; None of any other name."""
    match = _BRANCH.fullmatch(name)
    return None if match is None else int(match[1])


def training_of(checkpoint: str) -> str:
    """What the labels of one training's checkpoints have in common: the path without its step, mostly the last number."""
    inside = None if STEP_LAST.fullmatch(checkpoint) else STEP_INSIDE.fullmatch(checkpoint)
    if inside is None:
        name, _, rest = re.sub(r"\d+(?=\D*$)", "\0", checkpoint).partition("\0")
    else:
        name, rest = checkpoint[: inside.start(1)], checkpoint[inside.end(1) :]
    return name.rstrip("-_./") + rest or "series"


def accuracy_prefix(shift: str, ood_shift: str | None) -> str:
    """What the columns of an evaluation begin with: ``id`` without a shift, ``ood`` for the one that OOD means, else its
    name."""
    return "id" if shift == "none" else "ood" if shift == ood_shift else shift


def segment_of(row: Mapping[str, Any]) -> str:
    """The id of the segment that a row belongs to."""
    found = row.get("segment")
    return row["stage"] if found is None else found


def event_of(row: Mapping[str, Any]) -> Event:
    """The event that a row belongs to."""
    return segment_of(row), row["step"]


def weights_digest(checkpoint: Path) -> str:
    """SHA-256 over the weights of a checkpoint: what tells whether a branch starts from those that it says."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()
