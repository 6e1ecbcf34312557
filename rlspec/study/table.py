"""The table of a study: a row a measured cell, in the plan's order; wall-clock time has a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlspec.io.csv_text import csv_text
from rlspec.io.files import replacing, write_atomically
from rlspec.study.cells import Study
from rlspec.study.folder import StudyFolder

Row = dict[str, Any]


def rows_of(study: Study, folder: StudyFolder) -> list[Row]:
    """Digest, labels and results of every measured cell that is finished, outcomes of single deals included."""
    return [
        {"cell": cell.digest, **cell.labels, **folder.result(cell.digest)}
        for cell in study.measured()
        if folder.finished(cell.digest)
    ]


def write_tables(study: Study, folder: StudyFolder) -> None:
    """``table.csv``, ``table.parquet`` where pyarrow is installed, and ``timing.csv``."""
    rows = rows_of(study, folder)
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if _is_column(name)]
    write_atomically(folder.path / "table.csv", csv_text(columns, rows).encode())
    timing = [
        {"cell": cell.digest, "work": cell.work, "seconds": folder.seconds(cell.digest)}
        for cell in study.cells
    ]
    write_atomically(folder.path / "timing.csv", csv_text(["cell", "work", "seconds"], timing).encode())
    _write_parquet(folder.path / "table.parquet", columns, rows)


def _is_column(name: str) -> bool:
    return not name.endswith("_outcomes")


def _write_parquet(path: Path, columns: list[str], rows: list[Row]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    # A rank is a share, a count or a rule: as text, like every column that holds more than numbers.
    data = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        numbers = all(value is None or isinstance(value, (int, float)) for value in values)
        data[name] = values if numbers else [None if value is None else str(value) for value in values]
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(data), temporary)
