"""Several runs on one page: their curves on one axis, their figures side by side, and the settings that differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlspec.report.chart import COLOURS, Chart, Series, line_chart
from rlspec.report.curves import dashes, segment_lines, steps_from_base
from rlspec.report.data import Row, RunData, by_event
from rlspec.report.tables import Cells, number, shown
from rlspec.report.verdict import percent, trained
from rlspec.run.branches import decisive_events, rows_by_segment, segment_titles, start_name
from rlspec.run.rows import mean, rotation
from rlspec.run.segments import Segment, event_of

#: As many as there are colours that can be told apart.
MOST = len(COLOURS)
FIGURES = ("run", "segment", "ID peak", "ID at the end", "OOD peak", "OOD at the end", "OOD gained, points",
           "rotation, rad", "σ change", "‖ΔW‖/‖W‖", "KL, nats")  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A run by what the page calls it, with the mean over matrices of each of its spectral columns at each event."""

    name: str
    run: RunData
    colour: str

    def spectral(self, value_of: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
        """Row of metrics -> mean over the matrices of that event."""
        means = {event: mean(map(value_of, rows)) for event, rows in by_event(self.run.spectra).items()}
        return lambda row: means.get(event_of(row))


def named(names: Sequence[str], runs: Sequence[RunData]) -> list[Named]:
    return [Named(name, run, COLOURS[i % MOST]) for i, (name, run) in enumerate(zip(names, runs))]


def compared_curves(runs: Sequence[Named]) -> list[tuple[str, Chart | None]]:
    """(title, chart) of what any of the runs has measured: a colour for each run, a dash for each branch."""
    ends = [steps_from_base(row) for each in runs for row in each.run.metrics]
    x_range = (min(ends), max(*ends, min(ends) + 1))
    shifts = ", ".join(ood_shifts(runs))
    drawn: list[tuple[str, Chart | None]] = []
    for title, y_label, value_of, y_format, band, y_max in (
        ("ID accuracy", "deals solved", "id_accuracy", _percents, "id", 1.0),
        (f"OOD accuracy ({shifts})", "deals solved", "ood_accuracy", _percents, "ood", 1.0),
        ("Rotation", "mean angle, rad", rotation, _short, None, None),
        ("Singular-value change", "mean, relative", _sigma, _percents, None, None),
        ("Update", "‖ΔW‖/‖W‖", _delta, _short, None, None),
        ("KL to the base", "nats per token", "kl_base_nats_per_token", _short, None, None),
    ):
        lines: list[Series] = []
        for each in runs:
            found = _column(value_of) if isinstance(value_of, str) else each.spectral(value_of)
            lines += segment_lines(each.run, each.name, each.colour, found, band)
        chart = line_chart(
            lines, x_label="optimizer steps from the base", y_label=y_label, y_format=y_format, x_range=x_range,
            y_max=y_max,
        )  # fmt: skip
        if chart is not None:
            drawn.append((title, chart))
    return drawn


def compared_branches(runs: Sequence[Named]) -> list[tuple[str, str]]:
    """(dash, segments in words that are drawn with it), where any run has several."""
    if all(len(each.run.segments) == 1 for each in runs):
        return []
    found: dict[str, list[str]] = {}
    for each in runs:
        titles = segment_titles(each.run.segments)
        for name, dash in dashes(each.run):
            found.setdefault(dash, []).append(titles[name])
    return [(dash, " / ".join(dict.fromkeys(found[dash]))) for dash in sorted(found)]


def ood_shifts(runs: Sequence[Named]) -> list[str]:
    """What OOD is in these runs; more than one where their OOD accuracies are of different tasks."""
    found = [each.run.metrics[-1].get("ood_shift") for each in runs]
    return list(dict.fromkeys(shift for shift in found if shift))


def compared_figures(runs: Sequence[Named]) -> tuple[list[str], Cells]:
    """Headings and rows: one for each run and segment, without the columns that nobody has measured."""
    rows = [_figures(each, segment) for each in runs for segment in each.run.segments]
    kept = [i for i in range(len(FIGURES)) if any(row[i] != "–" for row in rows)]
    return [FIGURES[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _figures(each: Named, segment: Segment) -> list[str]:
    run, rows = each.run, rows_by_segment(each.run.metrics)[segment.id]
    events = decisive_events(run.segments, run.metrics)
    start, end = events.get(start_name(segment, events), rows[0]), rows[-1]
    before, after = start.get("ood_accuracy"), end.get("ood_accuracy")
    gained = None if before is None or after is None else 100 * (after - before)
    moved = each.spectral(_sigma)(end)
    return [
        each.name,
        segment_titles(run.segments)[segment.id] if run.config or len(run.segments) > 1 else "–",
        _peak(rows, "id_accuracy"),
        percent(end.get("id_accuracy")),
        _peak(rows, "ood_accuracy"),
        percent(after),
        number(gained, "+.1f"),
        number(each.spectral(rotation)(end), ".4f"),
        "–" if moved is None else f"{100 * moved:.2f} %",
        number(each.spectral(_delta)(end), ".4f"),
        number(end.get("kl_base_nats_per_token"), ".3f"),
    ]


def _peak(rows: Sequence[Row], column: str) -> str:
    measured = [row for row in rows if row.get(column) is not None]
    if not measured:
        return "–"
    best = max(measured, key=lambda row: row[column])
    return f"{percent(best[column])} (step {best['step']})"


def differences(runs: Sequence[Named]) -> Cells:
    """Setting, and its value in each run: of the settings that are not the same in all."""
    rows = [["trained by", *(_trained(each.run) for each in runs)]]
    for key in dict.fromkeys(shown(key) for each in runs for key in each.run.config):
        values = [
            next((shown(value) for name, value in each.run.config.items() if shown(name) == key), "–")
            for each in runs
        ]
        rows.append([key, *values])
    return [row for row in rows if len({*row[1:]}) > 1]


def _trained(run: RunData) -> str:
    return trained(run).removeprefix("trained by ") if run.config else "–"


def _column(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


def _sigma(row: Row) -> float | None:
    return row.get("sigma_change_rel_mean")


def _delta(row: Row) -> float | None:
    return row.get("delta_relative")


def _percents(value: float) -> str:
    return f"{100 * value:.3g} %"


def _short(value: float) -> str:
    return f"{value:.3g}"
