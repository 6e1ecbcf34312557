"""What a report of spectra alone is made of: the rows of `rlspec measure` or of a callback, with no run around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlspec.errors import RunFolderError
from rlspec.io.jsonl import Row, numbered_rows
from rlspec.report.data import RunData, by_event, check_row
from rlspec.report.scores import add_scores
from rlspec.report.tables import Cells, correlation, number
from rlspec.run.branches import rows_by_segment
from rlspec.run.correlations import score_correlations
from rlspec.run.rows import mean, rotation
from rlspec.run.segments import Segment, branch_origin, event_of, training_of

ROWS = "spectra.jsonl"
_UNNUMBERED = "without a step"


def read_series(folder: Path) -> RunData:
    """The rows of a folder as those of a run without accuracies.

    Checkpoints whose paths differ by more than their step, such as those of two branches or of two trainings, are
    segments of their own, in the order of the table. Those without a step come after the last step, each by itself, since
    nobody knows when it was; or, where none has a step, get their place in the table for one.

    Raises:
        RunFolderError: the file is missing or empty, or a line is no JSON object or holds something else than numbers
            where numbers belong; names file and line.
    """
    path = folder / ROWS
    found: dict[Any, Row] = {}
    unnumbered: dict[str, int] = {}  # checkpoint -> its place among those without a step
    for line, row in numbered_rows(path):
        checkpoint, step = row.get("checkpoint"), row.get("step")
        place = unnumbered.setdefault(str(checkpoint), len(unnumbered)) if step is None else step
        own = {"stage": row.get("stage") or "series", "step": place, "segment": _segment(row)}
        row |= own | {"unnumbered": step is None}
        check_row(f"{path}, line {line}", row, "module")
        # A series that was stopped while it was measured anew holds the rows before, too.
        matrix = str(checkpoint), str(row.get("name")), row.get("module")
        found[line if checkpoint is None else matrix] = row
    rows = list(found.values())
    if not rows:
        raise RunFolderError(f"{path}: no row yet; nothing to report")
    if numbered := [row["step"] for row in rows if not row["unnumbered"]]:
        for row in rows:
            if row["unnumbered"]:
                row["step"] += 1 + max(numbered)
                row["segment"] = f"{row.get('checkpoint')} ({_UNNUMBERED})"
    order = {name: i for i, name in enumerate(dict.fromkeys(row["segment"] for row in rows))}
    rows.sort(key=lambda row: (order[row["segment"]], row["step"]))
    starts = _starts(rows)
    events: list[Row] = [
        {
            "stage": of_it[0]["stage"], "segment": segment, "step": step,
            "global_step": step + starts.get(segment, 0),
            "checkpoint": of_it[0].get("checkpoint"), "unnumbered": of_it[0]["unnumbered"],
        }
        for (segment, step), of_it in by_event(rows).items()
    ]  # fmt: skip
    segments = [
        Segment(name, of_it[0]["stage"], of_it[-1]["step"], None, name)
        for name, of_it in rows_by_segment(events).items()
    ]
    return RunData(folder, {}, events, rows, {}, segments, add_scores(folder, events))


def _starts(rows: Sequence[Row]) -> dict[str, int]:
    """Segment -> the step of `rlspec track`'s SFT that it starts from, as its name says, or else the last one."""
    last = max((row["step"] for row in rows if row["stage"] == "sft"), default=0)
    found = {}
    for row in rows:
        if row["stage"] in ("ppo", "restore"):
            origins = map(branch_origin, Path(row["segment"]).parts)
            found[row["segment"]] = next((origin for origin in origins if origin is not None), last)
    return found


def _segment(row: Row) -> Any:
    """What the checkpoints of one training have in common: the path without its last number, which is the step."""
    if row.get("step") is None:
        return _UNNUMBERED
    if row.get("checkpoint") is None:
        return row.get("segment") or str(row.get("stage") or "series")
    return training_of(str(row["checkpoint"]))


def checkpoints(run: RunData) -> Cells:
    """Per checkpoint: matrices, mean rotation, the largest angle with its bound, values, size of the update, scores."""
    rows = []
    scores = {event_of(event): event.get("scores", {}) for event in run.metrics}
    for (segment, step), matrices in by_event(run.spectra).items():
        own = scores.get((segment, step), {})
        moved = mean(row.get("sigma_change_rel_mean") for row in matrices)
        rows.append(
            [
                str(matrices[0].get("checkpoint") or step),
                str(len(matrices)),
                number(mean(rotation(row) for row in matrices), ".4f"),
                *_largest(matrices),
                "–" if moved is None else f"{100 * moved:.2f} %",
                number(mean(row.get("delta_relative") for row in matrices), ".4f"),
                *(number(own.get(name), ".4g") for name in run.scores),
            ]
        )
    return rows


def correlations_with_scores(run: RunData) -> Cells:
    """Rank correlations of the metrics with each score, where five checkpoints or more have both."""
    matrices = by_event(run.spectra)
    found = score_correlations(
        [None if event["unnumbered"] else event["step"] for event in run.metrics],
        [matrices[event_of(event)] for event in run.metrics],
        [
            {name: value for name, value in event.get("scores", {}).items() if name in run.scores}
            for event in run.metrics
        ],
    )
    return [[row["score"], row["metric"], *correlation(row)] for row in found if row["n"] >= 5]


def sentence(run: RunData) -> str:
    """What the last checkpoint shows, in plain words."""
    last = list(by_event(run.spectra).values())[-1]
    turned, moved = (
        mean(rotation(row) for row in last),
        mean(row.get("sigma_change_rel_mean") for row in last),
    )
    where = last[0].get("checkpoint") or f"step {last[0]['step']}"
    if turned is None:
        return f"At {where} no angle was measured: see the notes."
    text = f"At {where} the leading directions of {len(last)} matrices have turned by {turned:.3g} rad on average"
    text += "." if moved is None else f", and their singular values have changed by {100 * moved:.2g} %."
    drawn = [row for row in last if row.get("null_random_rad") is not None]
    if drawn:
        beyond = sum(row.get("null_random_percentile") == 100 for row in drawn)
        text += (
            f" Random updates of the same size turn them by {mean(row['null_random_rad'] for row in drawn):.3g} rad; the "
            f"measured rotation is beyond all of them in {beyond} of {len(drawn)} matrices."
        )
    return text


def _largest(matrices: Sequence[Row]) -> tuple[str, str]:
    """The largest angle with its bound, and the matrix that has it."""
    found = max(matrices, key=_largest_angle)
    if _largest_angle(found) < 0:
        return "–", "–"
    bound = number(found.get("angle_error_bound_rad"), ".1g")
    return f"{_largest_angle(found):.4f} ± {bound}", str(found.get("name", ""))


def _largest_angle(row: Row) -> float:
    """-1 where none was measured."""
    found = [row.get(f"angle_{side}_max_rad") for side in ("left", "right")]
    return max((float(angle) for angle in found if angle is not None), default=-1.0)
