"""What a series of measurements is handed back as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from rlspec.io.jsonl import Row
from rlspec.io.tabular import Tabular
from rlspec.run.correlations import score_correlations
from rlspec.spectra.table import COLUMNS

#: what rows of scores call the reference, so that no checkpoint is called it
BASE_LABEL = "base"
_SCORE_COLUMNS = ("checkpoint", "step", "score", "value", "n", "by")  # of a table; results are a list a row


@dataclass(frozen=True)
class CheckpointSpectra:
    """The rows of one checkpoint, one per matrix: ``checkpoint`` and the columns of ``rlspec.spectra.table.COLUMNS``."""

    checkpoint: str  #: the end of its path that tells it from the others
    path: Path  #: where it was when it was measured
    stage: str
    step: int | None  #: None where its name has no number
    rows: list[Row]
    #: what it was read from: name of a file -> its size in bytes and when it was last changed, in nanoseconds
    files: dict[str, list[int]] = field(default_factory=dict, repr=False)


class Scores(Tabular, Sequence[Row]):
    """Rows of ``checkpoint``, ``step``, ``score``, ``value``, ``n``, ``results`` and ``by`` (what scored it), in the
    order of the series; ``checkpoint`` is ``"base"`` for the base. A table of them leaves ``results`` out."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._rows = tuple(rows)

    def _table(self) -> tuple[Sequence[str], Sequence[Row]]:
        return _SCORE_COLUMNS, self._rows

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Scores: ...
    def __getitem__(self, index: int | slice) -> Row | Scores:
        return Scores(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)


class Series(Tabular, Sequence[CheckpointSpectra]):
    """The spectra of checkpoints in the order of their steps, and their scores where some were taken."""

    def __init__(self, checkpoints: Sequence[CheckpointSpectra], scores: Sequence[Row] = ()) -> None:
        self._checkpoints = tuple(checkpoints)
        self.scores = Scores(scores)  #: of these checkpoints and of the base

    @property
    def rows(self) -> list[Row]:
        """All rows of spectra, checkpoint by checkpoint."""
        return [row for checkpoint in self._checkpoints for row in checkpoint.rows]

    def correlations(self) -> list[Row]:
        """Spearman's correlation of each metric, as its mean over the matrices, with each score over the checkpoints.

        Returns:
            Rows of ``score``, ``metric``, ``spearman``, ``low``, ``high`` (95 % by Fisher's z, which takes checkpoints
            for independent; None for fewer than 5) and ``n``, the checkpoints that have both. ``step`` and the score
            ``kl_base`` are among the metrics. No row where the correlation is not defined: fewer than 3 checkpoints, or
            values that do not vary.
        """
        by_checkpoint: dict[str, dict[str, float]] = {one.checkpoint: {} for one in self}
        for row in self.scores:
            by_checkpoint.get(row["checkpoint"], {})[row["score"]] = row["value"]
        return score_correlations(
            [one.step for one in self],
            [one.rows for one in self],
            [by_checkpoint[one.checkpoint] for one in self],
        )

    def _table(self) -> tuple[Sequence[str], Sequence[Row]]:
        return ["checkpoint", *COLUMNS], self.rows

    @overload
    def __getitem__(self, index: int) -> CheckpointSpectra: ...
    @overload
    def __getitem__(self, index: slice) -> Series: ...
    def __getitem__(self, index: int | slice) -> CheckpointSpectra | Series:
        if not isinstance(index, slice):
            return self._checkpoints[index]
        kept = self._checkpoints[index]
        labels = {BASE_LABEL, *(one.checkpoint for one in kept)}
        return Series(kept, [row for row in self.scores if row["checkpoint"] in labels])

    def __len__(self) -> int:
        return len(self._checkpoints)

    def __iter__(self) -> Iterator[CheckpointSpectra]:
        return iter(self._checkpoints)
