"""A run's accuracies watched for a fall from their peak, and what of the run's tree is left where a fall ends a segment.

All follows from the rows of complete events alone: a run that goes on decides as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rlspec.io.jsonl import Row
from rlspec.run.config import TrackConfig
from rlspec.run.segments import Segment, event_of, segment_of
from rlspec.tasks.alarm import Alarm, Fall
from rlspec.tasks.scores import Score


def eval_score(row: Row) -> Score:
    """The score that a row of evals.jsonl tells, with the outcome of each deal."""
    return Score(row["accuracy"], row["n"], tuple(map(float, row["outcomes"])))


def eval_events(evals: Iterable[Row], segment: str, shift: str) -> Iterator[tuple[int, Score]]:
    """(step, score) of one shift in one segment, in order."""
    return ((r["step"], eval_score(r)) for r in evals if segment_of(r) == segment and r["shift"] == shift)


def first_fall(config: TrackConfig, segment: str, evals: Iterable[Row]) -> Fall | None:
    """The first fall of the accuracy that ``config.alarm`` names within a segment, called by that name."""
    if config.alarm is None:
        return None
    alarm = Alarm(config.alarm)
    falls = (alarm.observe(*event) for event in eval_events(evals, segment, config.accuracies[config.alarm]))
    return next((fall for fall in falls if fall is not None), None)


def segments_left(config: TrackConfig, metrics: Sequence[Row], evals: Sequence[Row]) -> tuple[Segment, ...]:
    """The tree of ``config`` as far as a run goes, given its rows so far.

    With ``config.stop`` a segment ends at its first fall, and branches from steps past it are not run.
    """
    if not config.stop:
        return config.segments
    complete = {event_of(row) for row in metrics}
    known = [row for row in evals if event_of(row) in complete]
    left: dict[str, Segment] = {}
    for segment in config.segments:
        if segment.parent is not None and segment.parent[1] > left[segment.parent[0]].steps:
            continue
        fall = first_fall(config, segment.id, known)
        left[segment.id] = segment if fall is None else replace(segment, steps=fall.step)
    return tuple(left.values())
