"""The charts of a run: accuracy, rotation, KL and loss over one axis; Branches leave the trunk where they began."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle

from rlspec.report.chart import COLOURS, DASHES, Boundary, Chart, Series, line_chart, on_one_axis
from rlspec.report.data import Row, RunData, by_event
from rlspec.run.branches import method_title, rows_by_segment, segment_titles, trained_branches
from rlspec.run.rows import mean, rotation
from rlspec.run.segments import event_of

# Title, lines, label and form of the axis, height, top of the axis.
_Drawing = tuple[str, Sequence[Series], str, Callable[[float], str], int, float | None]


def curves(run: RunData) -> list[tuple[str, Chart | None]]:
    """(title, chart) in the order of the page; None where nothing was measured."""
    x_label = "optimizer steps from the base"
    if branches := trained_branches(run.segments):
        x_label += f" ({method_title(branches[-1])} updates count their optimizer steps)"
    ood = run.metrics[-1].get("ood_shift")
    accuracies = [
        *_metric_series(run, "ID (as trained)", "id_accuracy", "c0", "id"),
        *_metric_series(run, f"OOD ({ood})", "ood_accuracy", "c1", "ood"),
    ]
    shifts = run.config.get("shifts")
    others = [s for s in shifts if s not in ("none", ood)] if isinstance(shifts, list) else []
    for colour, shift in zip(cycle(COLOURS[2:]), others):
        accuracies += _metric_series(run, f"OOD ({shift})", f"{shift}_accuracy", colour, shift)
    rotations = _by_module(run, rotation)
    kl = _metric_series(run, "KL(base ‖ current)", "kl_base_nats_per_token", "c3")
    # PPO's loss mixes a clipped policy term with a value term: it is no measure of progress, so it is not drawn.
    loss = segment_lines(
        run,
        f"SFT, {_sft_loss(run.config)}",
        "c0",
        lambda row: row.get("loss") if row["stage"] == "sft" else None,
    )
    charts: list[_Drawing] = [
        ("Accuracy", accuracies, "deals solved", lambda v: f"{100 * v:.0f} %", 300, 1.0),
        ("Rotation", rotations, "mean angle, rad", lambda v: f"{v:.3g}", 200, None),
        ("KL to the base", kl, "nats per token", lambda v: f"{v:.3g}", 170, None),
        ("Training loss", loss, "nats per token", lambda v: f"{v:.3g}", 170, None),
    ]
    return _drawn(run, charts, x_label)


def _sft_loss(settings: Row) -> str:
    name = "DFT" if settings.get("sft_loss") == "dft" else "cross entropy"
    return f"{name} and KL to the start" if settings.get("sft_kl_coef") else name


def spectral_curves(run: RunData) -> list[tuple[str, Chart | None]]:
    """The same of spectra alone: rotation, change of the values, size of the update, subspace locking, scores."""
    charts: list[_Drawing] = [
        ("Rotation", _by_module(run, rotation), "mean angle, rad", lambda v: f"{v:.3g}", 260, None),
        (
            "Singular-value change", _by_module(run, lambda r: r.get("sigma_change_rel_mean")), "mean, relative",
            lambda v: f"{100 * v:.3g} %", 200, None,
        ),
        (
            "Update", _by_module(run, lambda r: r.get("delta_relative")), "‖ΔW‖/‖W‖", lambda v: f"{v:.3g}", 200, None,
        ),
        (
            "Leading subspaces that are not yet the last checkpoint's", _by_module(run, _unlocked), "mean share",
            lambda v: f"{100 * v:.3g} %", 200, None,
        ),
    ]  # fmt: skip
    scores = [(name, segment_lines(run, name, "c0", score_of(name))) for name in run.scores]
    drawn = [(f"Score {name}", lines, name, lambda v: f"{v:.4g}", 200, None) for name, lines in scores]
    placed = all(row.get("unnumbered") for row in run.metrics)
    return _drawn(run, charts, "place in the series" if placed else "step", around=drawn)


def score_of(name: str) -> Callable[[Row], float | None]:
    """Row of metrics -> its score of that name."""
    return lambda event: event.get("scores", {}).get(name)


def _unlocked(row: Row) -> float | None:
    """Of both sides' subspaces; what is left to turn is a curve down to nothing, the locking itself a line near 1."""
    locked = mean(row.get(f"locking_{side}") for side in ("left", "right"))
    return None if locked is None else 1.0 - locked


def _drawn(
    run: RunData, charts: Sequence[_Drawing], x_label: str, around: Sequence[_Drawing] = ()
) -> list[tuple[str, Chart | None]]:
    """Args: around: more charts, whose axes are around their values and do not begin at 0."""
    x_range, boundaries = _axis(run)
    drawings = [
        partial(
            line_chart, series, x_label=x_label, y_label=y_label, y_format=y_format, x_range=x_range, height=height,
            y_max=y_max, zoomed=zoomed, boundaries=boundaries,
        )
        for kind, zoomed in ((charts, False), (around, True))
        for _, series, y_label, y_format, height, y_max in kind
    ]  # fmt: skip
    titles = [title for title, *_ in (*charts, *around)]
    return list(zip(titles, on_one_axis(drawings)))


def _by_module(run: RunData, value_of: Callable[[Row], float | None]) -> list[Series]:
    """Lines of every module: the mean over its matrices."""
    spectra = by_event(run.spectra)
    found: list[Series] = []
    modules = dict.fromkeys(row["module"] for row in run.spectra)
    # Of more modules than colours some share one: no line is left out.
    for colour, module in zip(cycle((*COLOURS[2:6], *COLOURS[:2], *COLOURS[6:])), modules):

        def mean_of(row: Row, module: str = module) -> float | None:
            return mean(value_of(r) for r in spectra.get(event_of(row), []) if r["module"] == module)

        found += segment_lines(run, module, colour, mean_of)
    return found


def branch_legend(run: RunData) -> list[tuple[str, str]]:
    """(dash, segment in words) of every segment where there are several."""
    titles = segment_titles(run.segments)
    return [(dash, titles[name]) for name, dash in dashes(run)] if len(run.segments) > 1 else []


def dashes(run: RunData) -> Iterable[tuple[str, str]]:
    """(segment id, the class of its dash)."""
    for i, segment in enumerate(run.segments):
        yield segment.id, DASHES[(i - 1) % len(DASHES)] if i else "d0"


def steps_from_base(row: Row) -> float:
    """The position of a row of metrics on the axis."""
    at = row.get("global_step")
    return float(row["step"] if at is None else at)


def _axis(run: RunData) -> tuple[tuple[float, float], list[Boundary]]:
    xs = [steps_from_base(row) for row in run.metrics]
    titles = segment_titles(run.segments)
    groups = rows_by_segment(run.metrics)
    begun: dict[float, list[str]] = {}
    for segment in run.segments:
        if segment.parent is not None:
            begun.setdefault(steps_from_base(groups[segment.id][0]), []).append(titles[segment.id])
    boundaries = [Boundary(x, ", ".join(names)) for x, names in begun.items()]
    return (min(xs), max(max(xs), min(xs) + 1)), boundaries


def segment_lines(
    run: RunData, label: str, colour: str, value_of: Callable[[Row], float | None], band: str | None = None
) -> list[Series]:
    """A line per segment.

    Args:
        value_of: a row of metrics's value; None where there is none.
        band: the prefix of the columns of its interval.
    """
    titles, groups = segment_titles(run.segments), rows_by_segment(run.metrics)
    found = []
    for name, dash in dashes(run):
        rows = [(row, value) for row in groups[name] if (value := value_of(row)) is not None]
        points = [(steps_from_base(row), float(value)) for row, value in rows]
        around = (
            [(steps_from_base(row), row.get(f"{band}_low"), row.get(f"{band}_high")) for row, _ in rows]
            if band
            else []
        )
        whole = [(x, low, high) for x, low, high in around if low is not None and high is not None]
        where = titles[name] if len(titles) > 1 else ""
        names = [str(row.get("checkpoint")) for row, _ in rows if row.get("unnumbered")]
        found.append(Series(label, points, colour, whole, dash, where, names))
    return found


def _metric_series(run: RunData, label: str, key: str, colour: str, band: str | None = None) -> list[Series]:
    return segment_lines(run, label, colour, lambda row: row.get(key), band)
