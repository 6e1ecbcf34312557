"""What a report is made of: the rows of a run folder, read once and checked.

A run folder may come from anybody: what reaches the page as a number is one, of a size that can be drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlspec.errors import RunFolderError
from rlspec.io.jsonl import Row, numbered_rows
from rlspec.run.branches import tree_of
from rlspec.run.segments import Event, Segment, event_of

# The columns that the page reads.
_TEXTS = ("stage", "segment", "parent_segment", "module", "note", "ood_shift")
_NUMBERS = re.compile(
    r"(global_|parent_)?step|layer|rank|loss|nss_k|block_vectors|delta_relative|tracking_share|n|p_value|gained|lost"
    r"|more_in_(first|second)|seconds_.*"
    r"|.*_(accuracy(_before|_after)?|gain|low|high|n|rad|mean|percentile|per_token)",
    re.DOTALL,
)
_LARGEST = 1e100
# What each entry of the summary's tests and gains must hold.
_TESTED = {
    "tests": ("n", "p_value"),
    "gains": ("n", "first_gain", "second_gain", "more_in_first", "more_in_second", "p_value"),
}


@dataclass(frozen=True)
class RunData:
    """A run folder's contents; ``summary`` is empty while the run is unfinished.

    ``scores`` names those that were taken beside spectra alone; the metrics hold them as ``scores``.
    """

    folder: Path
    config: Row
    metrics: list[Row]
    spectra: list[Row]
    summary: Row
    segments: list[Segment]
    scores: Sequence[str] = ()


def read_run(folder: Path | str) -> RunData:
    """Read the files of a run folder; a run in progress will do once it has one complete event.

    Raises:
        RunFolderError: the folder or a file is missing, or a line is no JSON object or holds something else than
            numbers where numbers belong; names file and line.
    """
    path = Path(folder)
    if not path.is_dir():
        raise RunFolderError(f"{path}: no such run folder")
    config_file = path / "config.yaml"
    text = _text(config_file)
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{config_file}: not YAML: {' '.join(str(error).split())}") from None
    begun = (path / "metrics.jsonl").exists()  # a run has this file from its first event on
    metrics = _rows(path / "metrics.jsonl") if begun else []
    if not metrics:
        raise RunFolderError(f"{path / 'metrics.jsonl'}: no complete event yet; nothing to report")
    config = config if isinstance(config, dict) else {}
    complete = {event_of(row) for row in metrics}
    spectra = [row for row in _rows(path / "spectra.jsonl", "module") if event_of(row) in complete]
    return RunData(path, config, metrics, spectra, _summary(path), tree_of(metrics, config))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror}; is this a run folder?") from None
    except UnicodeDecodeError:
        raise RunFolderError(f"{path}: not UTF-8 text; is this a run folder?") from None


def _rows(path: Path, *texts: str) -> list[Row]:
    """The rows of a file, each with ``stage``, ``step`` and the ``texts`` named."""
    if not path.exists():
        raise RunFolderError(f"{path}: no such file; is this a run folder?")
    rows = []
    for number, row in numbered_rows(path):
        check_row(f"{path}, line {number}", row, *texts)
        rows.append(row)
    return rows


def check_row(place: str, row: Any, *texts: str) -> None:
    """Refuse what is no row of an event, or holds values of another kind than the page takes them for."""
    wanted = ("stage", "step", *texts)
    if any(_object(place, row).get(name) is None for name in wanted):
        raise RunFolderError(f"{place}: wanted an object with {', '.join(wanted)}")
    _check_values(place, row)


def _check_values(place: str, row: Row) -> None:
    for name, value in row.items():
        if value is None:
            continue
        if name in _TEXTS and not isinstance(value, str):
            wanted = "a text"
        elif _NUMBERS.fullmatch(name) and not is_number(value):
            wanted = "a number"
        else:
            continue
        raise RunFolderError(f"{place}: {_cut(name)} is {_cut(value)}, wanted {wanted}")


def is_number(value: Any) -> bool:
    """Whether a value is a number of a size that can be drawn."""
    return isinstance(value, (int, float)) and abs(value) <= _LARGEST  # NaN compares false


def _summary(folder: Path) -> Row:
    """The contents of summary.json, or nothing where the run has none yet."""
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    text = _text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise RunFolderError(f"{path}: not JSON") from None
    summary = _object(str(path), content)
    _check_values(str(path), summary)
    for name, event in _object(f"{path}, events", summary.get("events", {})).items():
        place = f"{path}, events, {_cut(name)}"
        check_row(place, _object(place, event).get("metrics"))
    for kind in ("tests", "gains"):
        for name, shifts in _object(f"{path}, {kind}", summary.get(kind, {})).items():
            place = f"{path}, {kind}, {_cut(name)}"
            for test in _object(place, shifts).values():
                wanted = _TESTED[kind]
                if any(_object(place, test).get(key) is None for key in wanted):
                    raise RunFolderError(f"{place}: wanted objects with {', '.join(wanted)}")
                _check_values(place, test)
    return summary


def _object(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise RunFolderError(f"{place}: {_cut(value)} where an object was wanted")
    return value


def _cut(value: Any) -> str:
    """A value on part of a line, whatever it holds."""
    return f"{value!a:.60}"


def event_name(row: Row, numbered: str) -> str:
    """What a row's event is called: as given, or, of a checkpoint without a step, as the checkpoint is."""
    return str(row.get("checkpoint")) if row.get("unnumbered") else numbered


def by_event(rows: Sequence[Row]) -> dict[Event, list[Row]]:
    """Rows grouped by event, in order."""
    groups: dict[Event, list[Row]] = {}
    for row in rows:
        groups.setdefault(event_of(row), []).append(row)
    return groups
