"""What a series of measurements is handed back as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from rlspec.errors import MissingPackageError
from rlspec.io.csv_text import csv_text
from rlspec.io.files import write_atomically, write_error
from rlspec.io.jsonl import Row
from rlspec.spectra.table import COLUMNS


@dataclass(frozen=True)
class CheckpointSpectra:
    """The rows of one checkpoint, one per matrix: ``checkpoint`` and the columns of ``rlspec.spectra.table.COLUMNS``."""

    checkpoint: str  #: the end of its path that tells it from the others
    stage: str
    step: int | None  #: None where its name has no number
    rows: list[Row]


class Series(Sequence[CheckpointSpectra]):
    """The spectra of checkpoints in the order of their steps."""

    def __init__(self, checkpoints: Sequence[CheckpointSpectra]) -> None:
        self._checkpoints = tuple(checkpoints)

    @property
    def rows(self) -> list[Row]:
        """All rows, checkpoint by checkpoint."""
        return [row for checkpoint in self._checkpoints for row in checkpoint.rows]

    def to_pandas(self) -> Any:
        """A DataFrame of all rows.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            if error.name != "pandas":
                raise
            raise MissingPackageError("Series.to_pandas", "pandas") from None
        return pandas.DataFrame(self.rows)

    def to_csv(self, path: str | Path) -> None:
        """Write all rows as a table of comma-separated values, its first line the names of the columns.

        Numbers are written so that they read back as the same; what is missing is an empty cell. Put there at once.

        Raises:
            CheckpointError: it cannot be written.
        """
        text = csv_text(["checkpoint", *COLUMNS], self.rows)
        try:
            write_atomically(Path(path), text.encode())
        except OSError as error:
            raise write_error(path, error) from None

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
