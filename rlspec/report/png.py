"""A chart's SVG as PNG, by CairoSVG, which knows neither CSS variables nor media queries."""

from __future__ import annotations

import re
from typing import Any

from rlspec.errors import MissingPackageError, OptionError

#: Pixels for each unit of a picture.
SCALE = 2


def renderer() -> Any:
    """CairoSVG's ``svg2png``.

    Raises:
        MissingPackageError: CairoSVG is not installed.
        OptionError: it does not find the Cairo library.
    """
    try:
        from cairosvg import svg2png
    except ModuleNotFoundError as error:
        if error.name != "cairosvg":
            raise
        raise MissingPackageError("writing figures as PNG", "cairosvg", extra="png") from None
    except OSError as error:
        told = " ".join(str(error).split())
        raise OptionError(
            f"image_format='png': CairoSVG finds no Cairo library ({told}); install it (libcairo2), or write svg"
        ) from None
    return svg2png


def as_png(svg: str) -> bytes:
    """The picture in its light colours, `SCALE` pixels a unit.

    Args:
        svg: as :func:`rlspec.report.figures.picture` writes it.

    Raises:
        MissingPackageError, OptionError: see :func:`renderer`.
    """
    drawn: bytes = renderer()(bytestring=plain(svg).encode(errors="replace"), scale=SCALE)
    return drawn


def plain(svg: str) -> str:
    """The same picture with a size of its own, and with a style in which every value is written out."""
    _, _, width, height = re.findall(r'viewBox="([^"]+)"', svg)[0].split()
    start, stop = svg.index("<style>"), svg.index("</style>")
    style = _without_media(svg[start:stop])
    values = dict(re.findall(r"(--\w+):\s*([^;}]+)", style))
    style = re.sub(r"var\((--\w+)\)", lambda match: values[match[1]].strip(), style)
    style = re.sub(r"(?<=\s)svg \{[^}]*\}", "", style)  # a size by what is around it, which is nothing
    return svg[:start].replace("<svg ", f'<svg width="{width}" height="{height}" ', 1) + style + svg[stop:]


def _without_media(style: str) -> str:
    """A style sheet without its @media blocks, which hold rules and no further blocks."""
    return re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", style)
