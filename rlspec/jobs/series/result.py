"""What a series of measurements is handed back as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from rlspec.io.jsonl import Row
from rlspec.io.tabular import Tabular
from rlspec.spectra.table import COLUMNS


@dataclass(frozen=True)
class CheckpointSpectra:
    """The rows of one checkpoint, one per matrix: ``checkpoint`` and the columns of ``rlspec.spectra.table.COLUMNS``."""

    checkpoint: str  #: the end of its path that tells it from the others
    stage: str
    step: int | None  #: None where its name has no number
    rows: list[Row]


class Series(Tabular, Sequence[CheckpointSpectra]):
    """The spectra of checkpoints in the order of their steps."""

    def __init__(self, checkpoints: Sequence[CheckpointSpectra]) -> None:
        self._checkpoints = tuple(checkpoints)

    @property
    def rows(self) -> list[Row]:
        """All rows, checkpoint by checkpoint."""
        return [row for checkpoint in self._checkpoints for row in checkpoint.rows]

    def _table(self) -> tuple[Sequence[str], Sequence[Row]]:
        return ["checkpoint", *COLUMNS], self.rows

    @overload
    def __getitem__(self, index: int) -> CheckpointSpectra: ...
    @overload
    def __getitem__(self, index: slice) -> Series: ...
    def __getitem__(self, index: int | slice) -> CheckpointSpectra | Series:
        if isinstance(index, slice):
            return Series(self._checkpoints[index])
        return self._checkpoints[index]

    def __len__(self) -> int:
        return len(self._checkpoints)

    def __iter__(self) -> Iterator[CheckpointSpectra]:
        return iter(self._checkpoints)
