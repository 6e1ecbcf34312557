"""What a study consists of: cells, each one unit of work on the weights of its parent, keyed by all that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Work = Literal["sft", "ppo", "restore", "measure"]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Attributes:
        work: "sft" trains and leaves checkpoints; "ppo" and "restore" change the parent's weights and measure what
            comes out; "measure" takes them as they are.
        settings: JSON values that decide the result, those that all cells of the study share among them.
        parent: digest of the cell whose checkpoint it starts from; None: the model that the study is given.
        step: which of the parent's checkpoints.
        labels: what the table calls it; they decide nothing.
    """

    work: Work
    settings: Settings
    parent: str | None = None
    step: int | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of everything that decides the result, ancestors included."""
        decisive = [self.work, dict(self.settings), self.parent, self.step]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "work": self.work,
            "settings": dict(self.settings),
            "parent": self.parent,
            "step": self.step,
            "labels": dict(self.labels),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cell:
        return cls(value["work"], value["settings"], value["parent"], value["step"], value["labels"])


@dataclass(frozen=True)
class Study:
    """The cells of a plan, parents before their children."""

    plan: str
    cells: Sequence[Cell]
    threads: int = 1  # of each cell: another number rounds otherwise, so a continued study keeps it

    def measured(self) -> list[Cell]:
        """The cells that are rows of the table."""
        return [cell for cell in self.cells if cell.work != "sft"]
