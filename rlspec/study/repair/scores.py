"""What a search compares: a cost to win back and a cost to keep low, of a model on disk or in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rlspec.restore.options import RestoreOptions

#: (sum of token losses, tokens) of each text
Sums = list[tuple[float, int]]


@dataclass(frozen=True)
class Costs:
    """``general`` is to be won back, ``task`` to be kept; less is better for both. ``details`` are of each text,
    where there are texts: {"general": ..., "task": ...} of `Sums`."""

    general: float
    task: float
    details: dict[str, Sums] | None = None


class Scores(Protocol):
    """How models are scored. What a score depends on besides the two checkpoints is in ``identity``."""

    @property
    def identity(self) -> str: ...
    @property
    def sign(self) -> float:
        """What a cost is multiplied by to be the score that was given: -1 where more of that is better."""
        ...

    @property
    def can_confirm(self) -> bool: ...
    @property
    def can_randomise(self) -> bool: ...
    def base(self, *, confirm: bool = False) -> Costs: ...
    def tuned(self, *, confirm: bool = False) -> Costs: ...
    def restored(self, options: RestoreOptions, *, confirm: bool = False) -> Costs: ...
    def randomised(self, options: RestoreOptions) -> Costs:
        """Of the tuned model, moved as far as a restoration moves each tensor, in random directions."""
        ...


def as_row(score: Costs) -> dict[str, Any]:
    return vars(score)


def from_row(row: dict[str, Any]) -> Costs:
    details = row["details"]
    if details is not None:
        details = {name: [(float(a), int(b)) for a, b in sums] for name, sums in details.items()}
    return Costs(row["general"], row["task"], details)
