"""`rlspec report`: write a run's report.html again, or that of spectra measured without a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report", short_help="Write the report of a run, or of measured spectra.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--figures", type=click.Path(path_type=Path), help="Write its charts there too, as SVG files.")
def command(folder: Path, figures: Path | None) -> None:
    """Write FOLDER/report.html: of a run folder, also while the run is still going, or of what `rlspec measure` or a
    callback left there."""
    from rlspec.report.html import write_report

    click.echo(write_report(folder))
    if figures is not None:
        from rlspec.report.figures import write_figures

        for path in write_figures(folder, figures):
            click.echo(path)
