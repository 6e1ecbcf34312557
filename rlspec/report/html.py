"""report.html: one self-contained page, readable without a network, without scripts and without the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from rlspec.io.files import write_atomically
from rlspec.report.chart import Series, line_chart
from rlspec.report.data import Row, RunData, by_event, mean, read_run, rotation, spearman
from rlspec.report.heatmap import colour_bar, heatmap
from rlspec.report.verdict import NAMES, accuracy, events, percent, verdict

_COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
_MOST_COLUMNS = 60  # of a heat map; longer runs are thinned evenly

_GLOSSARY = (
    ("ID and OOD accuracy", "In distribution: the task as trained on. Out of distribution: the same task under a "
     "changed rule, other cards or another target. Share of deals solved within the allowed turns; bands and "
     "brackets are 95 % Wilson intervals."),
    ("Singular values and vectors", "Every weight matrix is a sum of directions pairs (left and right singular "
     "vectors), each with a strength (its singular value)."),
    ("Rotation", "The principal angles between the leading singular subspaces of the reference and of the current "
     "weights; the mean over angles, over the left and right side, and over matrices. 0 is untouched, π/2 "
     "(1.57) is orthogonal."),
    ("Singular-value change", "Mean over the leading singular values of |σ − σ_ref| / σ_ref."),
    ("KL to the base", "Mean over answer tokens of KL(base ‖ current), in nats, on fixed task prompts: how far the "
     "model's predictions have moved."),
)  # fmt: skip


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises:
        RunFolderError: the folder is no run folder, or its files are malformed.
    """
    run = read_run(run_dir)
    target = run.folder / "report.html"
    write_atomically(target, render(run).encode())
    return target


def render(run: RunData) -> str:
    """The page's HTML."""
    style = resources.files("rlspec.report").joinpath("page.css").read_text(encoding="utf-8")
    name = escape(str(run.config.get("model", "")))
    body = "".join(
        [
            f"<h1>What fine-tuning did to the weights</h1><p class='dim'>Model {name}, task "
            f"{escape(str(run.config.get('task', '')))}, seed {run.config.get('seed', '')}; run folder "
            f"{escape(run.folder.name)}{'' if run.summary else '; the run is not finished'}</p>",
            f"<p class='verdict'>{escape(verdict(run))}</p>",
            _headlines(run),
            _curves(run),
            _maps(run),
            _table(run),
            _nulls(run),
            _correlations(run),
            _time(run),
            _notes(run),
            _configuration(run),
            "<h2>Words</h2><dl>"
            + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _GLOSSARY)
            + "</dl>",
        ]
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>rlspec report: {escape(run.folder.name)}</title><style>{style}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _headlines(run: RunData) -> str:
    found = events(run)
    cards = []
    for name, row in found.items():
        if name in ("sft_peak", "sft_end", "ppo_end"):
            cards.append((percent(row.get("ood_accuracy")), f"OOD, {NAMES[name]}"))
    last = run.metrics[-1]
    cards.insert(0, (percent(last.get("id_accuracy")), "ID at the end"))
    share = run.summary.get("tracking_share")
    if share is not None:
        cards.append((percent(share), "of the run's time spent tracking"))
    return (
        "<div class='cards'>"
        + "".join(f"<div><b>{v}</b><span>{escape(t)}</span></div>" for v, t in cards)
        + "</div>"
    )


def _x(row: Row) -> float:
    return float(row["global_step"] if "global_step" in row else row["step"])


def _axis(run: RunData) -> tuple[tuple[float, float], tuple[float, str, str] | None]:
    xs = [_x(row) for row in run.metrics]
    stages = list(dict.fromkeys(row["stage"] for row in run.metrics))
    boundary = None
    if len(stages) == 2:
        first = next(row for row in run.metrics if row["stage"] == stages[1])
        boundary = (_x(first), stages[0].upper(), stages[1].upper())
    return (min(xs), max(max(xs), min(xs) + 1)), boundary


def _metric_series(run: RunData, label: str, key: str, colour: str, band: str | None = None) -> Series:
    rows = [row for row in run.metrics if row.get(key) is not None]
    points = [(_x(row), float(row[key])) for row in rows]
    around = [(_x(row), row[f"{band}_low"], row[f"{band}_high"]) for row in rows] if band else []
    return Series(label, points, colour, around)


def _curves(run: RunData) -> str:
    x_range, boundary = _axis(run)
    x_label = "optimizer steps (PPO updates count their optimizer steps)" if boundary else "optimizer steps"
    ood = run.metrics[-1].get("ood_shift")
    accuracies = [
        _metric_series(run, "ID (as trained)", "id_accuracy", "c0", "id"),
        _metric_series(run, f"OOD ({ood})", "ood_accuracy", "c1", "ood"),
    ]
    others = [s for s in run.config.get("shifts", ()) if s not in ("none", ood)]
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
    drawn = []
    for title, series, y_label, y_format, height, y_max in charts:
        chart = line_chart(
            series, x_label=x_label, y_label=y_label, y_format=y_format, x_range=x_range, height=height,
            y_max=y_max, boundary=boundary,
        )  # fmt: skip
        drawn.append(f"<figure><figcaption>{title}</figcaption>{chart}</figure>")
    return "<h2>Accuracy, rotation and KL on one axis</h2>" + "".join(drawn)


def _maps(run: RunData) -> str:
    groups = list(by_event(run.spectra).items())
    if not groups:
        return ""
    stride = -(-len(groups) // _MOST_COLUMNS)
    kept = [g for i, g in enumerate(groups) if (len(groups) - 1 - i) % stride == 0]
    columns = [f"{stage} {step}" for (stage, step), _ in kept]
    sections = []
    kinds: tuple[tuple[str, Callable[[Row], float | None], Callable[[float], str]], ...] = (
        ("Rotation (mean angle, rad)", rotation, lambda v: f"{v:.3g} rad"),
        (
            "Singular-value change (mean, relative)",
            lambda r: r.get("sigma_change_rel_mean"),
            lambda v: f"{100 * v:.2g} %",
        ),
    )
    for title, value_of, value_format in kinds:
        cells: dict[str, dict[tuple[int, int], float]] = {}
        for column, (_, rows) in enumerate(kept):
            for row in rows:
                value = value_of(row)
                if value is not None:
                    cells.setdefault(row["module"], {})[(row["layer"] or 0, column)] = value
        if not cells:
            continue
        top = max(value for module in cells.values() for value in module.values())
        maps = [
            heatmap(
                found, layers=sorted({layer for layer, _ in found}), columns=columns, top=top,
                value_format=value_format, title=f"{module}: layer by event",
            )
            for module, found in cells.items()
        ]  # fmt: skip
        sections.append(
            f"<figure><figcaption>{title}; one scale for all projections</figcaption>"
            f"{colour_bar(top, value_format)}<div class='maps'>{''.join(maps)}</div></figure>"
        )
    return "<h2>Where in the model</h2>" + "".join(sections)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _table(run: RunData) -> str:
    spectra = by_event(run.spectra)
    rows = []
    for name, metrics in events(run).items():
        matrices = spectra.get((metrics["stage"], metrics["step"]), [])
        moved = mean(r.get("sigma_change_rel_mean") for r in matrices)
        rows.append(
            [
                NAMES[name],
                f"{metrics['stage']} {metrics['step']}",
                accuracy(metrics, "id"),
                accuracy(metrics, "ood"),
                _number(metrics.get("kl_base_nats_per_token"), ".3f"),
                _number(mean(rotation(r) for r in matrices), ".4f"),
                "–" if moved is None else f"{100 * moved:.2f} %",
                _number(mean(r.get("delta_relative") for r in matrices), ".4f"),
            ]
        )
    n = run.metrics[-1].get("id_n") or run.metrics[-1].get("ood_n")
    head = ("checkpoint", "step", "ID", "OOD", "KL, nats", "rotation, rad", "σ change", "‖ΔW‖/‖W‖")
    return f"<h2>Figures</h2>{_html_table(head, rows)}<p class='note'>n = {n} deals per accuracy; 95 % intervals.</p>"


def _nulls(run: RunData) -> str:
    rows = []
    for (stage, step), matrices in by_event(run.spectra).items():
        for module in dict.fromkeys(row["module"] for row in matrices):
            found = [r for r in matrices if r["module"] == module and r.get("null_random_rad") is not None]
            if not found or step == 0:
                continue
            beyond = sum(r["null_random_percentile"] == 100 for r in found)
            rows.append(
                [
                    module,
                    f"{stage} {step}",
                    _number(mean(rotation(r) for r in found), ".4f"),
                    _number(mean(r["null_random_rad"] for r in found), ".4f"),
                    _number(mean(r["null_rounding_rad"] for r in found), ".2g"),
                    f"{beyond} of {len(found)}",
                    _share_in_blocks(found),
                ]
            )
    if not rows:
        return ""
    head = (
        "projection",
        "step",
        "measured, rad",
        "random ΔW, rad",
        "bf16 rounding, rad",
        "beyond every random ΔW",
        "vectors in blocks",
    )
    return (
        "<h2>Is the rotation more than chance?</h2>"
        + _html_table(head, rows)
        + "<p class='note'>Beside the measured rotation: that of random updates of the same size, and that of "
        "rounding the weights to bfloat16. A rotation near the random one says that the weights moved, not where to; "
        "below it, the update spares the leading directions. Vectors in blocks lie closer together, by their singular "
        "values, than the update couples them: each by itself could point anywhere in its block.</p>"
    )


def _share_in_blocks(matrices: list[Row]) -> str:
    """Share of the leading vectors that are in near-degenerate blocks."""
    if any(row.get("block_vectors") is None for row in matrices):
        return "–"
    return (
        f"{100 * sum(row['block_vectors'] for row in matrices) / sum(row['rank'] for row in matrices):.0f} %"
    )


def _correlations(run: RunData) -> str:
    spectra = by_event(run.spectra)
    rows = [
        r for r in run.metrics if r["stage"] == "sft" and r.get("ood_accuracy") is not None and r["step"] > 0
    ]
    candidates: dict[str, Callable[[Row], float | None]] = {
        "rotation": lambda r: mean(rotation(m) for m in spectra.get((r["stage"], r["step"]), [])),
        "NSS_k": lambda r: mean(m.get("nss_k") for m in spectra.get((r["stage"], r["step"]), [])),
        "‖ΔW‖/‖W‖": lambda r: mean(m.get("delta_relative") for m in spectra.get((r["stage"], r["step"]), [])),
        "KL to the base": lambda r: r.get("kl_base_nats_per_token"),
    }
    lines = []
    for name, value_of in candidates.items():
        pairs = [(value, r["ood_accuracy"]) for r in rows if (value := value_of(r)) is not None]
        found = spearman([p[0] for p in pairs], [p[1] for p in pairs])
        lines.append([name, _number(found, "+.2f"), str(len(pairs))])
    if not any(line[1] != "–" for line in lines):
        return ""
    return (
        "<h2>What goes with OOD accuracy during SFT</h2>"
        + _html_table(("metric", "Spearman ρ with OOD accuracy", "checkpoints"), lines)
        + "<p class='note'>Checkpoints of one run follow each other and are few: all of these grow with training, so "
        "a high figure ranks nothing and proves no cause.</p>"
    )


def _time(run: RunData) -> str:
    last = run.metrics[-1]
    wall = last.get("seconds_wall")
    rows = []
    for key in ("training", "evaluating", "tracking", "kl", "saving"):
        seconds = last.get(f"seconds_{key}")
        if seconds is not None:
            rows.append([key, f"{seconds:.1f} s", percent(seconds / wall) if wall else "–"])
    if wall:
        rows.append(["in all", f"{wall:.1f} s", ""])
    return "<h2>Where the time went</h2>" + _html_table(("work", "time", "share"), rows)


def _notes(run: RunData) -> str:
    counts: dict[str, int] = {}
    for row in run.spectra:
        if row.get("note"):
            counts[row["note"]] = counts.get(row["note"], 0) + 1
    if not counts:
        return ""
    items = "".join(f"<li>{escape(note)} ({count} rows)</li>" for note, count in counts.items())
    return f"<h2>Notes of the measurement</h2><ul>{items}</ul>"


def _configuration(run: RunData) -> str:
    rows = [
        [str(k), ", ".join(map(str, v)) if isinstance(v, list) else str(v)] for k, v in run.config.items()
    ]
    return "<h2>Configuration</h2>" + _html_table(("setting", "value"), rows)
