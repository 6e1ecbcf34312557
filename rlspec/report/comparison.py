"""Several runs on one page: their curves on one axis, their figures side by side, and the settings that differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rlspec.report.chart import COLOURS, Chart, line_chart, on_one_axis
from rlspec.report.curves import dashes, score_of, segment_lines, steps_from_base
from rlspec.report.data import Row, RunData, by_event
from rlspec.report.tables import Cells, number, shown
from rlspec.report.verdict import percent, trained
from rlspec.run.branches import decisive_events, rows_by_segment, segment_titles, start_name
from rlspec.run.rows import mean, rotation
from rlspec.run.segments import Segment, event_of

#: As many as there are colours that can be told apart.
MOST = len(COLOURS)
_BANDED = 3  # runs: intervals of more would lie on each other and hide the lines
FIGURES = ("run", "segment", "ID peak", "ID at the end", "OOD peak", "OOD at the end", "OOD gained, points",
           "rotation, rad", "σ change", "‖ΔW‖/‖W‖", "KL, nats")  # fmt: skip


_Values = Callable[[Row], float | None]


@dataclass(frozen=True)
class Named:
    """A run by what the page calls it, with the mean over matrices of each of its spectral columns at each event."""

    name: str
    run: RunData
    colour: str

    def spectral(self, value_of: _Values) -> _Values:
        """Row of metrics -> mean over the matrices of that event."""
        means = {event: mean(map(value_of, rows)) for event, rows in by_event(self.run.spectra).items()}
        return lambda row: means.get(event_of(row))


# Title, label of the axis, what a row of a run's metrics has, form of the axis, prefix of the interval's columns, top of
# the axis, and whether it is around the values and not from 0.
_Kind = tuple[str, str, Callable[[Named], _Values], Callable[[float], str], str | None, float | None, bool]


def named(names: Sequence[str], runs: Sequence[RunData]) -> list[Named]:
    return [Named(name, run, COLOURS[i % MOST]) for i, (name, run) in enumerate(zip(names, runs))]


def compared_curves(runs: Sequence[Named]) -> list[tuple[str, Chart | None]]:
    """(title, chart) of what any of the runs has measured or scored: a colour for each run, a dash for each branch."""
    ends = [steps_from_base(row) for each in runs for row in each.run.metrics]
    x_range = (min(ends), max(*ends, min(ends) + 1))
    shifts = ", ".join(ood_shifts(runs))
    kinds: list[_Kind] = [
        ("ID accuracy", "deals solved", lambda _: _column("id_accuracy"), _percents, "id", 1.0, False),
        (f"OOD accuracy ({shifts})", "deals solved", lambda _: _column("ood_accuracy"), _percents, "ood", 1.0, False),
        ("Rotation", "mean angle, rad", lambda each: each.spectral(rotation), _short, None, None, False),
        ("Singular-value change", "mean, relative", lambda each: each.spectral(_sigma), _percents, None, None, False),
        ("Update", "‖ΔW‖/‖W‖", lambda each: each.spectral(_delta), _short, None, None, False),
        ("KL to the base", "nats per token", lambda _: _column("kl_base_nats_per_token"), _short, None, None, False),
    ]  # fmt: skip
    kinds += [_score_kind(name) for name in scored(runs)]
    drawings = [
        partial(
            line_chart,
            [
                line for each in runs
                for line in segment_lines(
                    each.run, each.name, each.colour, values(each), band if len(runs) <= _BANDED else None
                )
            ],
            x_label="optimizer steps from the base", y_label=y_label, y_format=y_format, x_range=x_range,
            y_max=y_max, zoomed=zoomed,
        )
        for _, y_label, values, y_format, band, y_max, zoomed in kinds
    ]  # fmt: skip
    drawn = zip(kinds, on_one_axis(drawings))
    return [(title, chart) for (title, *_), chart in drawn if chart is not None]


def _score_kind(name: str) -> _Kind:
    return f"Score {name}", name, lambda _: score_of(name), _score, None, None, True


def scored(runs: Sequence[Named]) -> list[str]:
    """The names of the scores that any of the runs has."""
    return list(dict.fromkeys(name for each in runs for name in each.run.scores))


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
    """Headings and rows: one for each run and segment, without the columns that nobody has measured. Of a score, where
    more is not always better: its last value, and the least and the most."""
    names = scored(runs)
    head = [*FIGURES, *(f"{name}{what}" for name in names for what in (" at the end", ", range"))]
    rows = [
        [*_figures(each, segment), *(cell for name in names for cell in _scores(each, segment, name))]
        for each in runs
        for segment in each.run.segments
    ]
    kept = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


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


def _scores(each: Named, segment: Segment, name: str) -> list[str]:
    rows = rows_by_segment(each.run.metrics)[segment.id]
    found = [value for value in map(score_of(name), rows) if value is not None]
    if not found:
        return ["–", "–"]
    return [number(score_of(name)(rows[-1]), ".4g"), f"{min(found):.4g} to {max(found):.4g}"]


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


def _column(name: str) -> _Values:
    return lambda row: row.get(name)


def _sigma(row: Row) -> float | None:
    return row.get("sigma_change_rel_mean")


def _delta(row: Row) -> float | None:
    return row.get("delta_relative")


def _score(value: float) -> str:
    return f"{value:.4g}"


def _percents(value: float) -> str:
    return f"{100 * value:.3g} %"


def _short(value: float) -> str:
    return f"{value:.3g}"
