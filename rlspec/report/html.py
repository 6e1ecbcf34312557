"""report.html: one self-contained page, readable without a network, without scripts and without the paper. Where scripts
run, its tables sort.

A run folder may come from anybody. Its texts reach the page through a template that escapes all of them, and nothing
here may tell the template that a text is HTML already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlspec.errors import OptionError, RunFolderError
from rlspec.io.files import told_apart, write_atomically
from rlspec.report.chart import Chart
from rlspec.report.comparison import (
    MOST,
    Named,
    compared_branches,
    compared_curves,
    compared_figures,
    differences,
    named,
    ood_shifts,
)
from rlspec.report.curves import branch_legend, curves, spectral_curves
from rlspec.report.data import RunData, read_run
from rlspec.report.heatmap import ColourBar, HeatMap
from rlspec.report.maps import maps
from rlspec.report.pages import rendered
from rlspec.report.series import ROWS, checkpoints, correlations_with_scores, read_series, sentence
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
from rlspec.report.verdict import headlines, paragraphs, trained


def write_report(run_dir: Path | str, out: Path | None = None) -> Path:
    """Write ``report.html`` into a run folder, or one that holds spectra alone, and return its path.

    Args:
        out: another place for the page. An earlier report there is replaced.

    Raises:
        RunFolderError: the folder is neither, its files are malformed, or the page cannot be written, or something else
            is in the place of ``out``.
    """
    folder = Path(run_dir)
    run, alone = _read(folder)
    text = render_series(run) if alone else render(run)
    if out is not None:
        _refuse_others(out, "report")
    return _write(out or folder / "report.html", text)


def write_comparison(run_dirs: Sequence[Path | str], out: Path | None = None) -> Path:
    """Write a page that compares runs, or folders that hold spectra alone, and return its path.

    Args:
        out: the page; default ``comparison.html`` in the first folder. An earlier comparison there is replaced.

    Raises:
        OptionError: fewer than two folders, more than can be told apart, or one of them twice.
        RunFolderError: as of :func:`write_report`, or something else than a comparison is in the page's place.
    """
    folders = [Path(folder) for folder in run_dirs]
    target = out or folders[0] / "comparison.html"
    text = render_comparison(_named(folders))
    _refuse_others(target, "comparison")
    return _write(target, text)


def _refuse_others(target: Path, kind: str) -> None:
    """Refuse to replace what is no page of this kind."""
    try:
        with target.open("rb") as file:
            beginning = file.read(1000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunFolderError(f"{target}: cannot be written: {error.strerror or error}") from None
    if f"<title>rlspec {kind}: ".encode() not in beginning:
        raise RunFolderError(
            f"{target}: what is there is no {kind} of rlspec's; choose another place for out="
        )


def _write(target: Path, text: str) -> Path:
    # Half of a surrogate pair, which JSON and file names may hold, has no UTF-8 and becomes a question mark.
    try:
        write_atomically(target, text.encode(errors="replace"))
    except OSError as error:
        raise RunFolderError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target


@dataclass(frozen=True)
class Drawings:
    """What a page draws: (title, chart), the branches as (dash, segment in words), heat maps; none of a comparison."""

    charts: list[tuple[str, Chart | None]]
    branches: list[tuple[str, str]]
    maps: list[tuple[str, ColourBar, list[HeatMap]]]


def drawings_of(folders: Sequence[Path]) -> Drawings:
    """Those of the report of a folder, or of a comparison of several."""
    if len(folders) > 1:
        runs = _named(folders)
        return Drawings(compared_curves(runs), compared_branches(runs), [])
    run, alone = _read(folders[0])
    return Drawings(spectral_curves(run) if alone else curves(run), branch_legend(run), maps(run))


def _named(folders: Sequence[Path]) -> list[Named]:
    if not 2 <= len(folders) <= MOST:
        raise OptionError(f"{len(folders)} folders to compare, wanted 2 to {MOST}")
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise OptionError(f"{folder}: given twice; a run is not compared with itself")
        seen.add(folder.resolve())
    return named(told_apart(folders), [_read(folder)[0] for folder in folders])


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
        "verdict": paragraphs(run),
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
        "branches": branch_legend(run),
        "maps": maps(run),
        "checkpoints": checkpoints(run),
        "scores": tuple(run.scores),
        "correlations": correlations_with_scores(run),
        "nulls": nulls(run),
        "notes": notes(run),
    }
    return rendered("series.html.jinja", facts)


def render_comparison(runs: Sequence[Named]) -> str:
    """The page's HTML, of several runs."""
    head, rows = compared_figures(runs)
    facts: dict[str, Any] = {
        "names": [each.name for each in runs],
        "unfinished": [each.name for each in runs if each.run.config and not each.run.summary],
        "head": head,
        "figures": rows,
        "shifts": ood_shifts(runs),
        "measured": "ID peak" in head or "OOD peak" in head,
        "charts": compared_curves(runs),
        "branches": compared_branches(runs),
        "differences": differences(runs),
    }
    return rendered("comparison.html.jinja", facts)
