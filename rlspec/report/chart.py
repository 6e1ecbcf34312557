"""Line charts: where everything is drawn, in the units of the picture. The template draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 900, 62, 28, 18, 40  # LEFT: the least; RIGHT: half of a label of six digits
#: CSS classes of lines, as many as can be told apart
COLOURS = tuple(f"c{i}" for i in range(10))
#: CSS classes of what a branch's line is dashed with; the trunk's, d0, is whole
DASHES = ("d1", "d2", "d3", "d4", "d5", "d6")
_BAR = 5  # half the width of an interval's bar
_DIGIT, _LETTER = 7.7, 6.8  # widths of a digit, and of a letter on average
_NAME = 30  # of the upright axis's name and the gaps on both sides of its labels
_ROW = 14  # height of a row of texts
_CROWD = 60  # dots of a line from which on they would touch


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), optionally a band (x, low, high); ``colour`` is one of `COLOURS`, ``dash`` d0 or
    one of `DASHES`.

    Lines of one label are one quantity in several segments of a run: the legend tells it once.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    band: Sequence[tuple[float, float, float]] = field(default=())
    dash: str = "d0"
    where: str = ""  # the segment, for the texts of the dots
    names: Sequence[str] = ()  # of the dots, where they are no steps


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
    radius: float = 3.0  # of a dot


@dataclass(frozen=True)
class Boundary:
    """A vertical line at ``x`` and what begins there, e.g. a branch of PPO; in place, the middle of its text too."""

    x: float
    text: str
    text_x: float = 0.0
    text_y: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A chart of ``WIDTH`` by ``height``; its axes are at ``left``, ``RIGHT``, ``top`` and ``BOTTOM`` from the edges."""

    height: int
    left: float
    top: float
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
    left: float = LEFT,
) -> Chart | None:
    """A line chart with a y axis from 0 to ``y_max``, or to a little above the largest value; None without points.

    Args:
        height: without the rows of texts that boundaries need beyond the first.
        zoomed: the y axis goes from a little below the least value instead.
        boundaries: their ``x`` in the units of the data.
        left: the least distance of the y axis from the edge; its longest label may ask for more.
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
    marks = ticks(bottom, top)
    told = [y_format(y) for y in marks]
    if len({*told}) < len(told):  # an axis so narrow that the short form does not tell its labels apart
        told = [f"{y:.10g}" for y in marks]
    left = max(left, _NAME + _DIGIT * max(map(len, told), default=0))
    plot_width, plot_height = WIDTH - left - RIGHT, height - TOP - BOTTOM
    begins = [replace(b, x=left + (b.x - low_x) / ((high_x - low_x) or 1) * plot_width) for b in boundaries]
    begins, rows = _staggered(begins)
    head = TOP + _ROW * (rows - 1)

    def place(x: float, y: float, text: str = "") -> Place:
        right = (x - low_x) / ((high_x - low_x) or 1)
        return Place(
            left + right * plot_width,
            head + (1 - (min(y, top) - bottom) / (top - bottom)) * plot_height,
            text,
        )

    lines = []
    for s in shown:
        names = [", ".join(part for part in (s.label, name) if part) for name in s.names]
        if not names:
            name = ", ".join(part for part in (s.label, s.where, "step") if part)
            names = [f"{name} {x:g}" for x, _ in s.points]
        dots = [place(x, y, f"{name}: {y_format(y)}") for name, (x, y) in zip(names, s.points, strict=True)]
        radius = 3.0 if len(dots) < _CROWD else 1.2
        lines.append(Line(s.label, s.colour, s.dash, dots, _outline(s.band, place), radius))
    return Chart(
        height=height + _ROW * (rows - 1),
        left=left,
        top=head,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[
            place(x, bottom, f"{x:g}") for x in ticks(low_x, high_x, max(1, min(8, int(high_x - low_x))))
        ],
        y_ticks=[place(low_x, y, text) for y, text in zip(marks, told)],
        boundaries=begins,
        lines=lines,
    )


def on_one_axis(drawings: Sequence[Callable[..., Chart | None]]) -> list[Chart | None]:
    """Charts whose y axes stand above each other: as far from the edge as the widest labels of any ask for.

    Args:
        drawings: `line_chart` with all but ``left`` given.
    """
    left = max((drawn.left for drawn in (draw() for draw in drawings) if drawn is not None), default=LEFT)
    return [draw(left=left) for draw in drawings]


def _staggered(boundaries: Sequence[Boundary]) -> tuple[list[Boundary], int]:
    """Boundaries with places for their texts, and the rows that these take: none leaves the picture or touches another.

    Args:
        boundaries: their ``x`` in the units of the picture.
    """
    ends: list[float] = []  # of each row, from the lowest
    rows = []
    middles = []
    ordered = sorted(boundaries, key=lambda b: b.x)
    for boundary in ordered:
        half = _LETTER * len(boundary.text) / 2
        middles.append(max(half, min(boundary.x, WIDTH - half)))
        row = next((i for i, end in enumerate(ends) if end < middles[-1] - half), len(ends))
        ends[row : row + 1] = [middles[-1] + half + _LETTER]
        rows.append(row)
    taken = max(1, len(ends))
    return [
        replace(boundary, text_x=x, text_y=TOP - 5 + _ROW * (taken - 1 - row))
        for boundary, x, row in zip(ordered, middles, rows)
    ], taken
