"""The charts of a run: accuracy, rotation, KL and loss over one axis of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlspec.report.chart import Boundary, Chart, Series, line_chart
from rlspec.report.data import Row, RunData, by_event
from rlspec.run.rows import mean, rotation

_COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")


def curves(run: RunData) -> list[tuple[str, Chart | None]]:
    """(title, chart) in the order of the page; None where nothing was measured."""
    x_range, boundary = _axis(run)
    x_label = "optimizer steps (PPO updates count their optimizer steps)" if boundary else "optimizer steps"
    ood = run.metrics[-1].get("ood_shift")
    accuracies = [
        _metric_series(run, "ID (as trained)", "id_accuracy", "c0", "id"),
        _metric_series(run, f"OOD ({ood})", "ood_accuracy", "c1", "ood"),
    ]
    shifts = run.config.get("shifts")
    others = [s for s in shifts if s not in ("none", ood)] if isinstance(shifts, list) else []
    for colour, shift in zip(_COLOURS[2:], others):
        accuracies.append(_metric_series(run, f"OOD ({shift})", f"{shift}_accuracy", colour, shift))
    place = {(row["stage"], row["step"]): _x(row) for row in run.metrics}
    modules = list(dict.fromkeys(row["module"] for row in run.spectra))
    rotations = []
    for colour, module in zip(_COLOURS[2:] + _COLOURS[:2], modules):
        points = []
        for event, rows in by_event(run.spectra).items():
            value = mean(rotation(row) for row in rows if row["module"] == module)
            if value is not None:
                points.append((place[event], value))
        rotations.append(Series(module, points, colour))
    kl = [_metric_series(run, "KL(base ‖ current)", "kl_base_nats_per_token", "c3")]
    # PPO's loss mixes a clipped policy term with a value term: it is no measure of progress, so it is not drawn.
    trained = [row for row in run.metrics if row["stage"] == "sft" and row.get("loss") is not None]
    loss = [Series("SFT, cross entropy", [(_x(row), row["loss"]) for row in trained], "c0")]
    charts: list[tuple[str, Sequence[Series], str, Callable[[float], str], int, float | None]] = [
        ("Accuracy", accuracies, "deals solved", lambda v: f"{100 * v:.0f} %", 280, 1.0),
        ("Rotation", rotations, "mean angle, rad", lambda v: f"{v:.3g}", 200, None),
        ("KL to the base", kl, "nats per token", lambda v: f"{v:.3g}", 170, None),
        ("Training loss", loss, "nats per token", lambda v: f"{v:.3g}", 170, None),
    ]
    return [
        (
            title,
            line_chart(
                series, x_label=x_label, y_label=y_label, y_format=y_format, x_range=x_range, height=height,
                y_max=y_max, boundary=boundary,
            ),
        )
        for title, series, y_label, y_format, height, y_max in charts
    ]  # fmt: skip


def _x(row: Row) -> float:
    at = row.get("global_step")
    return float(row["step"] if at is None else at)


def _axis(run: RunData) -> tuple[tuple[float, float], Boundary | None]:
    xs = [_x(row) for row in run.metrics]
    stages = list(dict.fromkeys(row["stage"] for row in run.metrics))
    boundary = None
    if len(stages) == 2:
        first = next(row for row in run.metrics if row["stage"] == stages[1])
        boundary = Boundary(_x(first), stages[0].upper(), stages[1].upper())
    return (min(xs), max(max(xs), min(xs) + 1)), boundary


def _metric_series(run: RunData, label: str, key: str, colour: str, band: str | None = None) -> Series:
    rows = [row for row in run.metrics if row.get(key) is not None]
    points = [(_x(row), float(row[key])) for row in rows]
    around = [(_x(row), row.get(f"{band}_low"), row.get(f"{band}_high")) for row in rows] if band else []
    whole = [(x, low, high) for x, low, high in around if low is not None and high is not None]
    return Series(label, points, colour, whole)
