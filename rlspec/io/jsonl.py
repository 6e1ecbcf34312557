"""Append-only JSON-lines files that survive a kill at any byte.

A row is one line of JSON. Rows are appended with one write and one fsync, so after a kill the file holds
every row acknowledged before it, and at most one cut-off line at its end, which :func:`repair` removes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlspec.errors import RlspecError, RunFolderError
from rlspec.io.files import write_atomically

Row = dict[str, Any]


def _plain(value: Any) -> Any:
    """A JSON value of ``value``; a NaN or infinite float becomes null, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    lines = [json.dumps(_plain(row), allow_nan=False, ensure_ascii=False) + "\n" for row in rows]
    return "".join(lines).encode()


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append ``rows`` to ``path`` and return once they are on disk.

    Raises:
        OSError: they cannot be written; the file is as it was.
    """
    data = _encode(rows)
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = file.write(data)
            if written < len(data):  # a disk that is full takes what it can
                file.write(data[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)  # or the next row would end half a line
            raise


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put ``rows`` in the place of what is in ``path``, at once."""
    write_atomically(path, _encode(rows))


def repair(path: Path) -> int:
    """Cut a partly written last line off ``path``; returns the number of bytes removed (0 if it is whole)."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    return len(data) - whole


def read_rows(path: Path, error: type[RlspecError] = RunFolderError) -> list[Row]:
    """The rows of ``path``, see :func:`numbered_rows`."""
    return [row for _, row in numbered_rows(path, error)]


def numbered_rows(
    path: Path, error: type[RlspecError] = RunFolderError, *, foreign: bool = False
) -> Iterator[tuple[int, Row]]:
    """Line numbers from 1 and rows of ``path``, as :func:`numbered_values` reads them.

    Raises:
        RlspecError: as there, or a line is not a JSON object.
    """
    for number, value in numbered_values(path, error, foreign=foreign):
        if not isinstance(value, dict):
            raise error(f"{path}, line {number}: a row must be a JSON object")
        yield number, value


def numbered_values(path: Path, error: type[RlspecError], *, foreign: bool) -> Iterator[tuple[int, Any]]:
    """Line numbers from 1 and JSON values of ``path``, none if it is missing. Empty lines are skipped.

    Args:
        error: what is raised.
        foreign: somebody else's file, whose last line counts without a newline; of our own files it is one that was
            cut off, and is skipped.

    Raises:
        RlspecError: The file cannot be read, or a line is not JSON; the message names file and line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None
    for number, line in enumerate(lines if foreign else lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError) as problem:
            raise error(f"{path}, line {number}: not JSON ({problem})") from None
        yield number, value


def keep_rows(path: Path, wanted: Callable[[Row], bool]) -> int:
    """Keep only the rows for which ``wanted`` holds; returns how many went."""
    rows = read_rows(path)
    kept = [row for row in rows if wanted(row)]
    if len(kept) < len(rows):
        write_rows(path, kept)
    return len(rows) - len(kept)
