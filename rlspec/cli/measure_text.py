"""What `rlspec measure` prints: a bar while it measures, and a table of means."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from rlspec.io.jsonl import Row
from rlspec.jobs.series.result import CheckpointSpectra
from rlspec.run.rows import mean

# Heading -> column whose mean over the matrices it is.
_MEANS = {
    "left rad": "angle_left_mean_rad",
    "right rad": "angle_right_mean_rad",
    "random rad": "null_random_rad",
    "sigma change": "sigma_change_rel_mean",
    "update": "delta_relative",
    "left locked": "locking_left",
    "right locked": "locking_right",
}


class Bar:
    """What is done and time left, on a terminal; nothing elsewhere."""

    def __init__(self, stream: TextIO | None = None, *, does: str = "measure", unit: str = "matrix") -> None:
        self._stream = stream or sys.stderr
        self._does, self._unit = does, unit
        self._bar: Any = None

    def __call__(self, done: int, total: int, checkpoint: str, matrix: str = "") -> None:
        if not self._stream.isatty():
            return
        if self._bar is None:
            self._bar = tqdm(total=total, unit=self._unit, desc=self._does, file=self._stream)
        self._bar.set_postfix_str(f"{checkpoint} {matrix}".strip()[-40:], refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def heading() -> str:
    """What the lines of :func:`series_lines` hold."""
    return (
        "means over the matrices: rotation of the leading left and right singular vectors, beside that of random updates "
        "of the same norm where they were drawn; relative change of the singular values; ||dW|| / ||W||; the share of "
        "the leading left and right subspaces that is the last checkpoint's, where that was asked for"
    )


def series_lines(series: Iterable[CheckpointSpectra]) -> list[str]:
    """One line a checkpoint under the names of the columns; columns without any value are left out."""
    rows: list[list[str]] = []
    for spectra in series:
        cells = [
            spectra.checkpoint,
            spectra.stage,
            "" if spectra.step is None else str(spectra.step),
            str(len(spectra.rows)),
        ]
        for column in _MEANS.values():
            value = mean(row.get(column) for row in spectra.rows)
            cells.append("" if value is None else f"{value:.4g}")
        rows.append(cells)
    if not rows:
        return []
    names = ["checkpoint", "stage", "step", "matrices", *_MEANS]
    kept = [i for i in range(len(names)) if any(row[i] for row in rows)]
    table = [names, *rows]
    widths = [max(len(row[i]) for row in table) for i in kept]
    return [
        "  ".join(
            row[i].ljust(width) if i < 2 else row[i].rjust(width) for i, width in zip(kept, widths)
        ).rstrip()
        for row in table
    ]


def score_lines(rows: Sequence[Row]) -> list[str]:
    """One line a checkpoint with its scores."""
    by_checkpoint: dict[str, list[str]] = {}
    for row in rows:
        by_checkpoint.setdefault(row["checkpoint"], []).append(f"{row['score']} {row['value']:.4g}")
    width = max(map(len, by_checkpoint), default=0)
    return [f"{label:<{width}}  {'  '.join(scores)}" for label, scores in by_checkpoint.items()]


def correlation_lines(rows: Sequence[Row]) -> list[str]:
    """A table of rank correlations, metrics by scores, where five checkpoints or more give an interval."""
    headings = {column: name for name, column in _MEANS.items()} | {"step": "step", "kl_base": "kl_base"}
    told = [row for row in rows if row["metric"] in headings and row["n"] >= 5]
    scores = list(dict.fromkeys(row["score"] for row in told))
    if not scores:
        return []
    cells = {(row["metric"], row["score"]): _correlation(row) for row in told}
    table = [["rank correlation (95 %)", *scores]]
    for metric in dict.fromkeys(row["metric"] for row in told):
        table.append([headings[metric], *(cells.get((metric, score), "") for score in scores)])
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)]


def _correlation(row: Row) -> str:
    interval = "" if row["low"] is None else f" ({row['low']:+.2f} to {row['high']:+.2f})"
    return f"{row['spearman']:+.2f}{interval}"
