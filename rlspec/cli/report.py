"""`rlspec report`: write a run's report.html again, that of spectra measured without a run, or compare several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rlspec.errors import OptionError

_PATH = click.Path(path_type=Path)


@click.command("report", short_help="Write the report of a run or of measured spectra; compare several.")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", type=_PATH)
@click.option(
    "--out", type=_PATH, help="The page; default FOLDER/report.html, of several comparison.html in the first."
)
@click.option("--figures", type=_PATH, help="Write the page's charts and heat maps there too, as SVG files.")
@click.option(
    "--format",
    "image_format",
    metavar="svg|png",
    default="svg",
    show_default=True,
    help="Of --figures: png writes those beside the SVG files; needs rlspec[png].",
)
def command(folders: tuple[Path, ...], out: Path | None, figures: Path | None, image_format: Any) -> None:
    """Write FOLDER/report.html: of a run folder, also while the run is still going, or of what `rlspec measure` or a
    callback left there. Of several folders, write one page that compares them."""
    if figures is None and image_format != "svg":
        raise OptionError(f"image_format={image_format!r} needs figures=, the folder to write them to")
    from rlspec.report.html import write_comparison, write_report

    click.echo(write_report(folders[0], out) if len(folders) == 1 else write_comparison(folders, out))
    if figures is not None:
        from rlspec.report.figures import write_figures

        for path in write_figures(folders, figures, image_format=image_format):
            click.echo(path)
