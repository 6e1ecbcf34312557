"""What holds rows, handed on as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlspec.errors import MissingPackageError
from rlspec.io.csv_text import csv_text
from rlspec.io.files import write_atomically, write_error
from rlspec.io.jsonl import Row


class Tabular:
    """Gives what holds rows two ways out; it says by :meth:`_table` what they are."""

    def _table(self) -> tuple[Sequence[str], Sequence[Row]]:
        """The names of the columns, and all rows."""
        raise NotImplementedError

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
            raise MissingPackageError(f"{type(self).__name__}.to_pandas", "pandas") from None
        return pandas.DataFrame(self._table()[1])

    def to_csv(self, path: str | Path) -> None:
        """Write all rows as a table of comma-separated values, its first line the names of the columns.

        Numbers are written so that they read back as the same; what is missing is an empty cell. Put there at once.

        Raises:
            CheckpointError: it cannot be written.
        """
        text = csv_text(*self._table())
        try:
            write_atomically(Path(path), text.encode())
        except OSError as error:
            raise write_error(path, error) from None
