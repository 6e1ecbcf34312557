"""report.html: one self-contained page, readable without a network, without scripts and without the paper. Where scripts
run, its tables sort.

A run folder may come from anybody. Its texts reach the page through a template that escapes all of them, and nothing
here may tell the template that a text is HTML already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlspec.errors import RunFolderError
from rlspec.io.files import write_atomically
from rlspec.report.chart import Chart
from rlspec.report.curves import branch_legend, curves, spectral_curves
from rlspec.report.data import RunData, read_run
from rlspec.report.maps import maps
from rlspec.report.pages import rendered
from rlspec.report.series import ROWS, checkpoints, read_series, sentence
from rlspec.report.tables import (
    configuration,
    correlations,
    figures,
    notes,
    nulls,
    recoveries,
    shown,
    time_spent,
)
from rlspec.report.verdict import headlines, trained, verdict


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run folder, or one that holds spectra alone, and return its path.

    Raises:
        RunFolderError: the folder is neither, its files are malformed, or the page cannot be written.
    """
    folder = Path(run_dir)
    run, alone = _read(folder)
    text = render_series(run) if alone else render(run)
    target = folder / "report.html"
    # Half of a surrogate pair, which JSON and file names may hold, has no UTF-8 and becomes a question mark.
    try:
        write_atomically(target, text.encode(errors="replace"))
    except OSError as error:
        raise RunFolderError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target


def charts_of(folder: Path) -> tuple[list[tuple[str, Chart | None]], list[tuple[str, str]]]:
    """(title, chart) of a folder's report, and its branches as (dash, segment in words)."""
    run, alone = _read(folder)
    return (spectral_curves(run), []) if alone else (curves(run), branch_legend(run))


def _read(folder: Path) -> tuple[RunData, bool]:
    """What a folder holds, and whether that is spectra alone."""
    alone = folder.is_dir() and not (folder / "config.yaml").exists()
    if alone and not (folder / ROWS).is_file():
        raise RunFolderError(f"{folder} holds no run (no config.yaml) and no spectra (no {ROWS})")
    return (read_series(folder) if alone else read_run(folder)), alone


def render(run: RunData) -> str:
    """The page's HTML."""
    last = run.metrics[-1]
    facts: dict[str, Any] = {
        "folder": run.folder.name,
        "finished": bool(run.summary),
        "model": shown(run.config.get("model", "")),
        "task": shown(run.config.get("task", "")),
        "seed": shown(run.config.get("seed", "")),
        "trained": trained(run),
        "verdict": verdict(run),
        "cards": headlines(run),
        "charts": curves(run),
        "branches": branch_legend(run),
        "recoveries": recoveries(run),
        "maps": maps(run),
        "figures": figures(run),
        "deals": last.get("id_n") or last.get("ood_n"),
        "nulls": nulls(run),
        "correlations": correlations(run),
        "time": time_spent(run),
        "notes": notes(run),
        "configuration": configuration(run),
    }
    return rendered("page.html.jinja", facts)


def render_series(run: RunData) -> str:
    """The page's HTML, of spectra without a run."""
    facts: dict[str, Any] = {
        "folder": run.folder.name,
        "sentence": sentence(run),
        "charts": spectral_curves(run),
        "maps": maps(run),
        "checkpoints": checkpoints(run),
        "nulls": nulls(run),
        "notes": notes(run),
    }
    return rendered("series.html.jinja", facts)
