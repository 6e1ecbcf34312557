"""The end of a run: its decisive events, paired tests between them, and where the time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rlspec.io.jsonl import Row
from rlspec.run.alarm import eval_events, segments_left
from rlspec.run.branches import (
    decisive_events,
    event_title,
    pairs_to_test,
    segment_titles,
    start_name,
    trained_branches,
)
from rlspec.run.config import TrackConfig
from rlspec.run.correlations import rank_correlations
from rlspec.run.evaluation import compare_gains, describe_test, paired_test
from rlspec.run.folder import RunFolder
from rlspec.run.rows import mean, rotation
from rlspec.run.segments import Event, Segment, event_of
from rlspec.tasks.alarm import Fall, describe_fall, standing_fall


def summarize(config: TrackConfig, folder: RunFolder) -> Row:
    """The contents of summary.json.

    ``segments`` is the tree. ``events`` names the decisive ones (start, OOD peak of SFT, end of each segment, start of
    each branch) with their metrics row and, per module, their spectra; ``tests`` are McNemar tests between them
    on the same deals. The peak is chosen by the outcomes that it is tested on, so its test flatters the peak; ``note``
    says so. ``gains`` compares the gain of the first branch with that of each later one. ``alarms`` are the accuracies
    that fell from their peak within a segment, whose tests allow for the choice (see ``rlspec.tasks.alarm``).
    ``correlations`` are those of each metric with OOD accuracy over the events of SFT.
    """
    metrics, spectra, evals = folder.metrics(), folder.spectra(), folder.evals()
    segments = segments_left(config, metrics, evals)
    chosen = decisive_events(segments, metrics)
    pairs = pairs_to_test(segments, chosen)
    branches = trained_branches(segments)
    ends = [(chosen[start_name(segment, chosen)], chosen[f"{segment.id}_end"]) for segment in branches]
    last = metrics[-1]
    return {
        "run": folder.run_id,
        "settings": config.to_settings(),
        "segments": [_segment_row(segment) for segment in segments],
        "events": {
            name: {"metrics": row, "spectra": module_means(spectra, event_of(row))}
            for name, row in chosen.items()
        },
        "tests": {f"{a}_to_{b}": _tests(evals, chosen[a], chosen[b]) for a, b in pairs},
        "gains": {
            f"{branches[0].id}_and_{later.id}": _gains(evals, ends[0], moved)
            for later, moved in zip(branches[1:], ends[1:])
        },
        "correlations": rank_correlations(metrics, spectra),
        "alarms": _alarms(config, folder, segments, evals),
        "note": "the OOD peak is chosen on the deals that its test uses, so that test favours a fall from it",
        "seconds": {
            name.removeprefix("seconds_"): last[name] for name in last if name.startswith("seconds_")
        },
        "tracking_share": last["seconds_tracking"] / last["seconds_wall"],
    }


def _alarms(
    config: TrackConfig, folder: RunFolder, segments: Sequence[Segment], evals: Sequence[Row]
) -> list[Row]:
    """The first fall from its peak of each shift in each segment, where that was not reached again."""
    found = []
    for segment in segments:
        for shift in config.shifts:
            fall = standing_fall(shift, eval_events(evals, segment.id, shift))
            if fall is not None:
                kept = config.keeps_checkpoint(segment.stage, fall.peak_step)
                place = folder.checkpoint_dir(segment.id, fall.peak_step).relative_to(folder.path)
                checkpoint = str(place) if kept else None
                found.append({"segment": segment.id, **asdict(fall), "checkpoint": checkpoint})
    return found


def _alarm_lines(summary: Row, folder: Path | None) -> list[str]:
    ood = next(iter(summary["events"].values()))["metrics"].get("ood_shift")
    lines = []
    for row in summary.get("alarms", ()):
        fall = Fall(**{name: row[name] for name in Fall.__dataclass_fields__})
        kind = "ID" if fall.name == "none" else f"OOD ({fall.name})" if fall.name == ood else fall.name
        place = row["checkpoint"]
        checkpoint = None if place is None else place if folder is None else str(folder / place)
        lines.append(f"{row['segment']}: {describe_fall(fall, title=kind, checkpoint=checkpoint)}")
    return lines


def _segment_row(segment: Segment) -> Row:
    parent, step = segment.parent or (None, None)
    return {
        "segment": segment.id,
        "stage": segment.stage,
        "method": segment.method,
        "steps": segment.steps,
        "parent_segment": parent,
        "parent_step": step,
    }


def module_means(spectra: Sequence[Row], event: Event) -> dict[str, dict[str, float | None]]:
    """Per module, the mean over its matrices of the main spectral figures at one event; None if undefined."""
    by_module: dict[str, list[Row]] = defaultdict(list)
    for row in spectra:
        if event_of(row) == event:
            by_module[row["module"]].append(row)
    names = ("angle_left_mean_rad", "angle_right_mean_rad", "sigma_change_rel_max", "delta_relative")
    means: dict[str, dict[str, float | None]] = {}
    for module, rows in by_module.items():
        means[module] = {name: mean(row.get(name) for row in rows) for name in names}
        means[module]["rotation_rad"] = mean(rotation(row) for row in rows)
    return means


def _by_shift(evals: Sequence[Row], event: Row) -> dict[str, Row]:
    return {row["shift"]: row for row in evals if event_of(row) == event_of(event)}


def _tests(evals: Sequence[Row], before: Row, after: Row) -> dict[str, Row]:
    """Shift -> McNemar test between two events."""
    start, end = _by_shift(evals, before), _by_shift(evals, after)
    return {shift: paired_test(start[shift], end[shift]) for shift in start}


def _gains(evals: Sequence[Row], first: tuple[Row, Row], second: tuple[Row, Row]) -> dict[str, Row]:
    """Shift -> comparison of the gains of two branches."""
    (a, b), (c, d) = ([_by_shift(evals, event) for event in pair] for pair in (first, second))
    return {shift: compare_gains((a[shift], b[shift]), (c[shift], d[shift])) for shift in a}


def summary_lines(summary: Row, folder: Path | None = None) -> list[str]:
    """What `rlspec track` prints at its end: the decisive events, the tests between them, what fell from its peak and
    the checkpoint of it in ``folder``, and where the time went."""
    segments = _segments(summary)
    titles = {name: event_title(name, segments) for name in summary["events"]}
    width = max(map(len, ("event", *titles.values())))
    steps = {name: f"{event['metrics']['step']}" for name, event in summary["events"].items()}
    ood = next(iter(summary["events"].values()))["metrics"].get("ood_shift")
    ood_title = f"OOD ({ood})" if ood else "OOD"
    head = f"{'event':<{width}}{'step':>6}{'loss':>8}  {'ID':<24}{ood_title:<24}{'KL':>7}{'rotation':>10}{'sigma':>9}"
    lines = ["", head]
    for name, event in summary["events"].items():
        row = event["metrics"]
        spectra = event["spectra"].values()
        lines.append(
            f"{titles[name]:<{width}}{steps[name]:>6}"
            f"{_number(row.get('loss'), '.3f'):>8}  "
            f"{_share(row, 'id'):<24}{_share(row, 'ood'):<24}"
            f"{_number(row['kl_base_nats_per_token'], '.3f'):>7}"
            f"{_number(mean(module['rotation_rad'] for module in spectra), '.4f'):>10}"
            f"{_number(mean(module['sigma_change_rel_max'] for module in spectra), '.2%'):>9}"
        )
    lines.append(
        "step: within its segment; KL: nats per answer token from the base; rotation: mean principal angle to the "
        "base, rad; sigma: largest relative change of a singular value; both means over matrices"
    )
    lines.append("")
    for pair, tests in summary["tests"].items():
        before, after = (titles[name] for name in pair.split("_to_"))
        lines += [f"{before} -> {after}, {describe_test(test)}" for test in tests.values()]
    if any("_peak_to_" in pair for pair in summary["tests"]):
        lines.append(f"({summary['note']})")
    lines += _gain_lines(summary["gains"], segment_titles(segments))
    lines += _alarm_lines(summary, folder)
    seconds = summary["seconds"]
    lines.append("")
    lines.append(
        f"time    {seconds['wall']:.0f} s: training {seconds['training']:.0f}, evaluating "
        f"{seconds['evaluating']:.0f}, tracking {seconds['tracking']:.1f} ({summary['tracking_share']:.1%} "
        f"of the wall time), KL {seconds['kl']:.1f}, saving {seconds['saving']:.1f}"
    )
    return lines


def _segments(summary: Row) -> list[Segment]:
    found = []
    for row in summary["segments"]:
        parent = None if row["parent_segment"] is None else (row["parent_segment"], row["parent_step"])
        found.append(Segment(row["segment"], row["stage"], row["steps"], parent, row.get("method", "")))
    return found


def _gain_lines(gains: Mapping[str, Mapping[str, Row]], titles: Mapping[str, str]) -> list[str]:
    lines = []
    for pair, by_shift in gains.items():
        first, second = (titles[name] for name in pair.split("_and_"))
        lines += [
            f"gain of {first} against {second}, shift {row['shift']}: {100 * row['first_gain']:+.1f} against "
            f"{100 * row['second_gain']:+.1f} points ({row['more_in_first']} deals gained more in the first, "
            f"{row['more_in_second']} in the second, sign test p = {row['p_value']:.2g})"
            for row in by_shift.values()
        ]
    return lines


def _share(row: Row, prefix: str) -> str:
    if row.get(f"{prefix}_accuracy") is None:
        return "-"
    accuracy, low, high = (row[f"{prefix}_{name}"] for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1%} [{low:.1%}, {high:.1%}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
