"""`rlspec report`: write a run's report.html again."""

from __future__ import annotations

from pathlib import Path

import click

from rlspec.run.folder import RunFolder


@click.command("report", short_help="Write the report of a run folder.")
@click.argument("run", type=click.Path(path_type=Path))
def command(run: Path) -> None:
    """Write RUN/report.html from the files of the run folder RUN; works while the run is still going."""
    from rlspec.report.html import write_report

    RunFolder(run).settings()
    click.echo(write_report(run))
