"""The charts and heat maps of a report as pictures of their own: SVG and PNG files, for a paper or a README."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, get_args

from rlspec.errors import OptionError, RunFolderError
from rlspec.io.files import write_atomically
from rlspec.report.chart import WIDTH, Chart
from rlspec.report.heatmap import ColourBar, HeatMap
from rlspec.report.html import drawings_of
from rlspec.report.pages import rendered
from rlspec.report.png import as_png, renderer

ImageFormat = Literal["svg", "png"]

# Height of a line of the legend; widths of a letter and of what stands before a text.
_ROW, _LETTER, _MARK = 20, 6.6, 46
# Where the first heat map begins, below the key; between two of them.
_MAPS, _GAP = 56.0, 12.0


@dataclass(frozen=True)
class Entry:
    """A line of the legend: where, what its mark looks like, what it says."""

    x: float
    y: float
    style: str
    text: str


def write_figures(
    folders: Sequence[Path | str], goal: Path, *, image_format: ImageFormat = "svg"
) -> list[Path]:
    """Write every chart of a folder's report, or of a comparison, into ``goal`` as <name>.svg; return the files. Those of
    a report are its heat maps too.

    Args:
        folders: run folders, or ones that hold spectra alone; several are compared.
        image_format: ``png`` writes <name>.png beside each, by the package CairoSVG.

    Raises:
        OptionError, RunFolderError: as of :func:`rlspec.report.html.write_comparison`.
        MissingPackageError: CairoSVG is asked for and is not there; nothing is written.
    """
    if image_format not in get_args(ImageFormat):
        raise OptionError(f"image_format={image_format!r}: valid are {', '.join(get_args(ImageFormat))}")
    if image_format == "png":
        renderer()
    found = drawings_of([Path(folder) for folder in folders])
    pictures = [
        (title, picture(title, drawn, found.branches)) for title, drawn in found.charts if drawn is not None
    ]
    for title, bar, group in found.maps:
        pictures.append((f"{title.partition(' (')[0]} by layer", sheet(title, bar, group)))
    written = []
    try:
        goal.mkdir(parents=True, exist_ok=True)
        taken: set[str] = set()
        for title, content in pictures:
            name = _file_name(title, taken)
            taken.add(name)
            files = {"svg": content.encode(errors="replace")}
            if image_format == "png":
                files["png"] = as_png(content)
            for ending, data in files.items():
                target = goal / f"{name}.{ending}"
                write_atomically(target, data)
                written.append(target)
    except OSError as error:
        raise RunFolderError(f"{goal}: cannot be written: {error.strerror or error}") from None
    return written


def _file_name(title: str, taken: Container[str]) -> str:
    """A title as the name of a file; of two scores that differ in punctuation alone the second has a number."""
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    return next(full for i in count(1) if (full := name if i == 1 else f"{name}-{i}") not in taken)


def picture(title: str, drawn: Chart, branches: list[tuple[str, str]]) -> str:
    """A chart with its legend above it, as the text of an SVG file."""
    entries, head = _legend(drawn, branches)
    facts = {"title": title, "chart": drawn, "entries": entries, "head": head, "branches": branches}
    return rendered("figure.svg.jinja", facts)


def sheet(title: str, bar: ColourBar, maps: Sequence[HeatMap]) -> str:
    """Heat maps on one scale, with its key above them, as the text of an SVG file."""
    placed: list[tuple[float, float, HeatMap]] = []
    x, y, below = 0.0, _MAPS, _MAPS
    for drawn in maps:
        if placed and x + drawn.width > WIDTH:
            x, y = 0.0, below
        placed.append((x, y, drawn))
        x, below = x + drawn.width + _GAP, max(below, y + drawn.height + _GAP)
    return rendered("maps.svg.jinja", {"title": title, "bar": bar, "placed": placed, "height": below})


def _legend(drawn: Chart, branches: list[tuple[str, str]]) -> tuple[list[Entry], int]:
    """Entries from left to right, and the height that they take."""
    told = [(line.colour, line.label) for line in drawn.legend]
    told += [(f"ink {dash}", text) for dash, text in branches if len(drawn.dashes) > 1]
    entries: list[Entry] = []
    x, y = drawn.left, 14
    for style, text in told:
        width = _MARK + _LETTER * len(text) + 16
        if entries and x + width > WIDTH:
            x, y = drawn.left, y + _ROW
        entries.append(Entry(x, y, style, text))
        x += width
    return entries, y + 10
