"""The tables of a run: rows of cells, as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rlspec.report.data import Row, RunData, by_event, event_name
from rlspec.report.verdict import accuracy, branch_ends, paired, percent, turned
from rlspec.run.branches import decisive_events, event_title, segment_titles
from rlspec.run.correlations import rank_correlations
from rlspec.run.rows import mean, rotation
from rlspec.run.segments import event_of, segment_of

Cells = list[list[str]]


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def recoveries(run: RunData) -> Cells:
    """Per branch: OOD and ID accuracy before and after, the paired OOD test, and the rotation from the base."""
    titles = segment_titles(run.segments)
    rows = []
    for segment, start, before, after in branch_ends(run):
        test = paired(run, start, f"{segment.id}_end") or {}
        rows.append(
            [
                titles[segment.id],
                accuracy(before, "ood"),
                accuracy(after, "ood"),
                f"{number(test.get('gained'), '.0f')} / {number(test.get('lost'), '.0f')}",
                number(test.get("p_value"), ".2g"),
                f"{percent(before.get('id_accuracy'))} → {percent(after.get('id_accuracy'))}",
                f"{number(turned(run, before), '.4f')} → {number(turned(run, after), '.4f')}",
            ]
        )
    return rows


def figures(run: RunData) -> Cells:
    """The decisive events: accuracies, KL, rotation, change of the singular values, size of the update."""
    spectra = by_event(run.spectra)
    rows = []
    for name, metrics in decisive_events(run.segments, run.metrics).items():
        matrices = spectra.get(event_of(metrics), [])
        moved = mean(r.get("sigma_change_rel_mean") for r in matrices)
        rows.append(
            [
                event_title(name, run.segments),
                f"{segment_of(metrics)} {metrics['step']}",
                accuracy(metrics, "id"),
                accuracy(metrics, "ood"),
                number(metrics.get("kl_base_nats_per_token"), ".3f"),
                number(mean(rotation(r) for r in matrices), ".4f"),
                "–" if moved is None else f"{100 * moved:.2f} %",
                number(mean(r.get("delta_relative") for r in matrices), ".4f"),
            ]
        )
    return rows


def nulls(run: RunData) -> Cells:
    """Per projection and event with null draws: the measured rotation beside those of chance and of rounding."""
    rows = []
    for (segment, step), matrices in by_event(run.spectra).items():
        for module in dict.fromkeys(row["module"] for row in matrices):
            found = [r for r in matrices if r["module"] == module and r.get("null_random_rad") is not None]
            if not found or (step == 0 and not found[0].get("unnumbered")):
                continue
            beyond = sum(r.get("null_random_percentile") == 100 for r in found)
            rows.append(
                [
                    module,
                    event_name(found[0], f"{segment} {step}"),
                    number(mean(rotation(r) for r in found), ".4f"),
                    number(mean(r["null_random_rad"] for r in found), ".4f"),
                    number(mean(r.get("null_rounding_rad") for r in found), ".2g"),
                    f"{beyond} of {len(found)}",
                    _share_in_blocks(found),
                ]
            )
    return rows


def _share_in_blocks(matrices: list[Row]) -> str:
    """Share of the leading vectors that are in near-degenerate blocks."""
    if any(row.get("block_vectors") is None or not row.get("rank") for row in matrices):
        return "–"
    return (
        f"{100 * sum(row['block_vectors'] for row in matrices) / sum(row['rank'] for row in matrices):.0f} %"
    )


def correlations(run: RunData) -> Cells:
    """Rank correlations with OOD accuracy over the SFT checkpoints; none where none is defined."""
    return [[row["metric"], *correlation(row)] for row in rank_correlations(run.metrics, run.spectra)]


def correlation(row: Row) -> list[str]:
    """A rank correlation, its interval, and of how many places it is."""
    interval = "–" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"
    return [number(row["spearman"], "+.2f"), interval, str(row["n"])]


def time_spent(run: RunData) -> Cells:
    """Seconds and shares of the wall time, by kind of work."""
    last = run.metrics[-1]
    wall = last.get("seconds_wall")
    rows = []
    for key in ("training", "evaluating", "tracking", "kl", "saving"):
        seconds = last.get(f"seconds_{key}")
        if seconds is not None:
            rows.append([key, f"{seconds:.1f} s", percent(seconds / wall) if wall else "–"])
    if wall:
        rows.append(["in all", f"{wall:.1f} s", ""])
    return rows


def notes(run: RunData) -> list[tuple[str, int]]:
    """Notes of the measurement, and how many rows have each."""
    return list(Counter(row["note"] for row in run.spectra if row.get("note")).items())


def configuration(run: RunData) -> Cells:
    """Every setting."""
    return [[shown(name), shown(value)] for name, value in run.config.items()]


def shown(value: Any) -> str:
    """A setting as text. No setting is nested, and in YAML a short text may nest without end: that is not shown."""
    items = value if isinstance(value, list) else [value]
    return ", ".join(
        "(nested)" if isinstance(item, (dict, list, set, tuple)) else str(item) for item in items
    )
