"""Scores that were taken beside the spectra, for their report: ``scores.jsonl`` of `rlspec measure` or of a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlspec.errors import RunFolderError
from rlspec.io.jsonl import Row, numbered_rows
from rlspec.report.data import is_number

FILE = "scores.jsonl"
_MOST = 8  # names that are drawn
_LONGEST = 60  # letters of a name


def add_scores(folder: Path, events: list[Row]) -> list[str]:
    """Give each event that has some its ``scores``, name -> value, from the file in a folder.

    Of a score that was taken in several ways, by other texts say, it is the last that counts.

    Args:
        events: with ``checkpoint``, which the rows of `rlspec measure` name, or else the ``step`` that those of a
            callback do.

    Returns:
        The names, in the order of the file; none without a file.

    Raises:
        RunFolderError: a line is no JSON object, or no score; names file and line.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    known = {_place(event) for event in events}
    by_event: dict[tuple[str, object], dict[str, float]] = {}
    names: dict[str, None] = {}
    rows: list[Row] = []
    for line, row in numbered_rows(path):
        name: Any = row.get("score") if isinstance(row, dict) else None
        value: Any = row.get("value") if isinstance(row, dict) else None
        if not isinstance(name, str) or not is_number(value):
            raise RunFolderError(
                f"{path}, line {line}: wanted an object with score, a name, and value, a number"
            )
        rows.append(row)
    newest = {row["score"]: row.get("by") for row in rows}
    for row in rows:
        if row.get("by") != newest[row["score"]]:  # other texts', or another command's
            continue
        name = row["score"][:_LONGEST]
        by_event.setdefault(_place(row), {})[name] = row["value"]
        if _place(row) in known:  # the base has its own, and no event
            names[name] = None
    for event in events:
        event["scores"] = by_event.get(_place(event), {})
    return list(names)[:_MOST]


def _place(row: Row) -> tuple[str, object]:
    checkpoint = row.get("checkpoint")
    return ("step", row.get("step")) if checkpoint is None else ("checkpoint", str(checkpoint))
