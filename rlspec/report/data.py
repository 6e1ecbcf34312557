"""What a report is made of: the rows of a run folder, read once and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlspec.errors import RunFolderError

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """A run folder's contents; ``summary`` is empty while the run is unfinished."""

    folder: Path
    config: Row
    metrics: list[Row]
    spectra: list[Row]
    summary: Row


def read_run(folder: Path | str) -> RunData:
    """Read the files of a run folder; a run in progress will do once it has one complete event.

    Raises:
        RunFolderError: the folder or a file is missing, or a line is no JSON object; names file and line.
    """
    path = Path(folder)
    if not path.is_dir():
        raise RunFolderError(f"{path}: no such run folder")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
    except OSError as error:
        raise RunFolderError(f"{path / 'config.yaml'}: {error.strerror}; is this a run folder?") from None
    except yaml.YAMLError as error:
        raise RunFolderError(f"{path / 'config.yaml'}: not YAML: {' '.join(str(error).split())}") from None
    metrics = _rows(path / "metrics.jsonl")
    if not metrics:
        raise RunFolderError(f"{path / 'metrics.jsonl'}: no complete event yet; nothing to report")
    complete = {(row["stage"], row["step"]) for row in metrics}
    spectra = [row for row in _rows(path / "spectra.jsonl") if (row["stage"], row["step"]) in complete]
    summary_file = path / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.is_file() else {}
    return RunData(path, config if isinstance(config, dict) else {}, metrics, spectra, summary)


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise RunFolderError(f"{path}: no such file; is this a run folder?")
    lines = path.read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):  # a write that was cut short; the run itself repairs it when resumed
                continue
            raise RunFolderError(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
            raise RunFolderError(f"{path}, line {number}: wanted an object with stage and step")
        rows.append(row)
    return rows


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there, or None."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def rotation(row: Row) -> float | None:
    """A matrix's rotation: mean principal angle, averaged over the sides where it is defined; radians."""
    return mean((row.get("angle_left_mean_rad"), row.get("angle_right_mean_rad")))


def by_event(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows grouped by (stage, step), in order."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["stage"], row["step"]), []).append(row)
    return groups


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; ties share their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end + 1) / 2
        start = end
    return ranks


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than 3 pairs or where one side does not vary."""
    if len(x) < 3:
        return None
    a, b = _ranks(x), _ranks(y)
    centre = (len(x) + 1) / 2
    saa = sum((v - centre) ** 2 for v in a)
    sbb = sum((v - centre) ** 2 for v in b)
    if saa == 0 or sbb == 0:
        return None
    covariance = sum((v - centre) * (w - centre) for v, w in zip(a, b))
    return float(covariance / (saa * sbb) ** 0.5)
