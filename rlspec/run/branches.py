"""The tree of a run as its rows tell it: segments, their names in words, and the events that decide the story."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlspec.run.segments import Segment, method_of, segment_of

Row = dict[str, Any]


def rows_by_segment(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows grouped by the id of their segment, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(segment_of(row), []).append(row)
    return groups


def tree_of(metrics: Sequence[Row], config: Mapping[str, Any]) -> list[Segment]:
    """The segments of a run so far, each with the steps that its rows reach.

    In rows from before there were branches a second segment does not name its parent: it is the first one, at the
    step that the settings name, or else at its end.
    """
    segments: list[Segment] = []
    for name, rows in rows_by_segment(metrics).items():
        origin = rows[0].get("parent_segment"), rows[0].get("parent_step")
        parent = None if origin[0] is None or origin[1] is None else (str(origin[0]), int(origin[1]))
        if parent is None and segments:
            named = config.get("ppo_from")
            parent = (segments[0].id, named) if isinstance(named, int) else segments[0].end
        stage = rows[0]["stage"]
        segments.append(Segment(name, stage, rows[-1]["step"], parent, method_of(stage, config)))
    return segments


def method_title(segment: Segment) -> str:
    """What trained a segment: ``SFT``, ``PPO``, ``GRPO`` or ``RLOO``."""
    return segment.method or segment.stage.upper()


def trained_branches(segments: Sequence[Segment]) -> list[Segment]:
    """The branches that training goes on in."""
    return [segment for segment in segments if segment.parent is not None and segment.stage != "restore"]


def segment_titles(segments: Sequence[Segment]) -> dict[str, str]:
    """Segment id -> its name in words: ``PPO``, or ``PPO from step 100`` where the run could mean another step."""
    branches = trained_branches(segments)
    ends = [segment.end for segment in segments]
    titles = {}
    for segment in segments:
        told = segment in branches and (len(branches) > 1 or segment.parent not in ends)
        titles[segment.id] = method_title(segment) + (
            f" from step {segment.parent[1]}" if segment.parent and told else ""
        )
    return titles


def event_title(name: str, segments: Sequence[Segment]) -> str:
    """The name in words of a decisive event."""
    segment, _, what = name.rpartition("_")
    title = segment_titles(segments)[segment]
    own = next(s for s in segments if s.id == segment)
    if what == "start" and own.parent is None:
        return "base"
    if own.stage == "restore":
        return "restored"
    return f"{'OOD peak' if what == 'peak' else what} of {title}"


def decisive_events(segments: Sequence[Segment], metrics: Sequence[Row]) -> dict[str, Row]:
    """Name -> metrics row: the start and the end of each segment, and the OOD peak of SFT.

    A branch from another segment's end has no start of its own: it is that end.
    """
    chosen: dict[str, Row] = {}
    ends = [segment.end for segment in segments]
    groups = rows_by_segment(metrics)
    for segment in segments:
        rows = groups[segment.id]
        if segment.parent not in ends:
            chosen[f"{segment.id}_start"] = rows[0]
        measured = [row for row in rows if row.get("ood_accuracy") is not None]
        if segment.stage == "sft" and segment.parent is None and measured:
            chosen[f"{segment.id}_peak"] = max(measured, key=lambda row: row["ood_accuracy"])
        chosen[f"{segment.id}_end"] = rows[-1]
    return chosen


def start_name(segment: Segment, events: Mapping[str, Row]) -> str:
    """The name of the decisive event that a branch starts from."""
    own = f"{segment.id}_start"
    return own if own in events or segment.parent is None else f"{segment.parent[0]}_end"


def pairs_to_test(segments: Sequence[Segment], events: Mapping[str, Row]) -> list[tuple[str, str]]:
    """The pairs of decisive events whose outcomes are compared: the fall, to where each branch starts and to the end
    of SFT; the recovery, from there to the end of each branch; and what each branch did instead of more SFT. What is
    restored is tested as a branch is."""
    pairs = []
    for segment in segments:
        start, end = start_name(segment, events), f"{segment.id}_end"
        if segment.parent is None:
            peak = f"{segment.id}_peak"
            pairs += [(peak, end)] if peak in events else [(start, end)]
            continue
        peak, trunk_end = f"{segment.parent[0]}_peak", f"{segment.parent[0]}_end"
        if peak in events and events[peak]["step"] < segment.parent[1]:
            pairs.append((peak, start))
        pairs += [(trunk_end, end), (start, end)]
    return list(dict.fromkeys(pairs))
