"""Line charts: where everything is drawn, in the units of the picture. The template draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 900, 62, 28, 18, 40  # RIGHT: half of a label of six digits
#: CSS classes of lines, as many as can be told apart
COLOURS = tuple(f"c{i}" for i in range(10))
_BAR = 5  # half the width of an interval's bar


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), optionally a band (x, low, high); ``colour`` is one of `COLOURS`, ``dash`` one d0 … d3.

    Lines of one label are one quantity in several segments of a run: the legend tells it once.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    band: Sequence[tuple[float, float, float]] = field(default=())
    dash: str = "d0"
    where: str = ""  # the segment, for the texts of the dots


@dataclass(frozen=True)
class Place:
    """A position in the picture, x to the right and y downwards from its upper left corner, and its text."""

    x: float
    y: float
    text: str = ""


@dataclass(frozen=True)
class Line:
    """A series in place: its dots, and the outline of its band (empty where it has none)."""

    label: str
    colour: str
    dash: str
    dots: Sequence[Place]
    outline: Sequence[Place]


@dataclass(frozen=True)
class Boundary:
    """A vertical line at ``x`` and what begins there, e.g. a branch of PPO."""

    x: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart of ``WIDTH`` by ``height``; its axes are at ``LEFT``, ``RIGHT``, ``TOP`` and ``BOTTOM`` from the edges."""

    height: int
    x_label: str
    y_label: str
    x_ticks: Sequence[Place]
    y_ticks: Sequence[Place]
    boundaries: Sequence[Boundary]
    lines: Sequence[Line]

    @property
    def legend(self) -> Sequence[Line]:
        """The lines that the legend shows: the first of each label."""
        return list({line.label: line for line in reversed(self.lines)}.values())[::-1]

    @property
    def dashes(self) -> set[str]:
        """Those of its lines."""
        return {line.dash for line in self.lines}


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    raw = (high - low) / count
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _outline(
    band: Sequence[tuple[float, float, float]], place: Callable[[float, float], Place]
) -> list[Place]:
    """There along the upper edge of a band and back along the lower one; of one that lies above a single point of the
    axis the last interval, as a bar."""
    upper, lower = ([place(x, (low, high)[i]) for x, low, high in band] for i in (1, 0))
    if not band or band[0][0] != band[-1][0]:
        return upper + lower[::-1]
    left, right = ([replace(end, x=end.x + to) for end in (upper[-1], lower[-1])] for to in (-_BAR, _BAR))
    return left + right[::-1]


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str],
    x_range: tuple[float, float],
    height: int = 260,
    y_max: float | None = None,
    zoomed: bool = False,
    boundaries: Sequence[Boundary] = (),
) -> Chart | None:
    """A line chart with a y axis from 0 to ``y_max``, or to a little above the largest value; None without points.

    Args:
        zoomed: the y axis goes from a little below the least value instead.
        boundaries: their ``x`` in the units of the data.
    """
    shown = [s for s in series if s.points]
    if not shown:
        return None
    tops = [y for s in shown for _, y in s.points] + [high for s in shown for *_, high in s.band]
    top, bottom = y_max if y_max is not None else (max(tops) * 1.08 or 1.0), 0.0
    if zoomed:
        least, most = min(tops), max(tops)
        room = 0.08 * (most - least) or 0.08 * abs(most) or 1.0
        bottom, top = least - room, most + room
    low_x, high_x = x_range
    plot_width, plot_height = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def place(x: float, y: float, text: str = "") -> Place:
        right = (x - low_x) / ((high_x - low_x) or 1)
        return Place(
            LEFT + right * plot_width, TOP + (1 - (min(y, top) - bottom) / (top - bottom)) * plot_height, text
        )

    lines = []
    for s in shown:
        name = ", ".join(part for part in (s.label, s.where, "step") if part)
        dots = [place(x, y, f"{name} {x:g}: {y_format(y)}") for x, y in s.points]
        lines.append(Line(s.label, s.colour, s.dash, dots, _outline(s.band, place)))
    return Chart(
        height=height,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[place(x, bottom, f"{x:g}") for x in ticks(low_x, high_x, 8)],
        y_ticks=[place(low_x, y, y_format(y)) for y in ticks(bottom, top)],
        boundaries=[Boundary(place(boundary.x, bottom).x, boundary.text) for boundary in boundaries],
        lines=lines,
    )
