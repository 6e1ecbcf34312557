"""A piece of a study's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlspec.report.chart import Chart
from rlspec.tasks import wilson_interval

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A heading, what was found in plain words, and what shows it."""

    title: str
    text: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    chart: Chart | None = None
    note: str = ""


def pooled(rows: Sequence[Row], name: str) -> str:
    """The success rate over the deals of all rows, with its Wilson interval."""
    outcomes = "".join(row[f"{name}_outcomes"] for row in rows)
    low, high = wilson_interval(outcomes.count("1"), len(outcomes))
    return f"{outcomes.count('1') / len(outcomes):.1%} [{low:.1%}, {high:.1%}]"


def between(interval: tuple[float, float] | None, form: str) -> str:
    """An interval in brackets, or a dash."""
    return "–" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"
