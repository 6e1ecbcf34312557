"""Line charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 900, 62, 16, 14, 40


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), optionally a band (x, low, high); ``colour`` is a CSS class c0 … c5."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    band: Sequence[tuple[float, float, float]] = field(default=())


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str],
    x_range: tuple[float, float],
    height: int = 260,
    y_max: float | None = None,
    boundary: tuple[float, str, str] | None = None,
) -> str:
    """An SVG line chart with a y axis from 0.

    Args:
        boundary: (x, name before, name after) of a vertical line, e.g. where SFT ends and PPO begins.
    """
    shown = [s for s in series if s.points]
    if not shown:
        return '<p class="note">Nothing was measured here.</p>'
    tops = [y for s in shown for _, y in s.points] + [high for s in shown for *_, high in s.band]
    top = y_max if y_max is not None else (max(tops) * 1.08 or 1.0)
    low_x, high_x = x_range
    plot_width, plot_height = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def px(x: float) -> float:
        return LEFT + (x - low_x) / ((high_x - low_x) or 1) * plot_width

    def py(y: float) -> float:
        return TOP + (1 - min(y, top) / top) * plot_height

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(y_label)}">']
    for y in ticks(0, top):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{y_format(y)}</text>')
    for x in ticks(low_x, high_x, 8):
        parts.append(f'<text x="{px(x):.1f}" y="{height - 22}" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text x="{LEFT + plot_width / 2}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = TOP + plot_height / 2
    parts.append(
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    if boundary is not None:
        x, before, after = boundary
        parts.append(
            f'<line class="boundary" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP}" y2="{TOP + plot_height}"/>'
            f'<text x="{px(x) - 6:.1f}" y="{TOP + plot_height - 6}" text-anchor="end">{escape(before)}</text>'
            f'<text x="{px(x) + 6:.1f}" y="{TOP + plot_height - 6}">{escape(after)}</text>'
        )
    for s in shown:
        if s.band:
            there = [f"{px(x):.1f},{py(high):.1f}" for x, _, high in s.band]
            back = [f"{px(x):.1f},{py(low):.1f}" for x, low, _ in reversed(s.band)]
            parts.append(f'<polygon class="band {s.colour}" points="{" ".join(there + back)}"/>')
    for s in shown:
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
        parts.append(f'<polyline class="line {s.colour}" points="{points}"/>')
        for x, y in s.points:
            parts.append(
                f'<circle class="dot {s.colour}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3">'
                f"<title>{escape(s.label)}, step {x:g}: {y_format(y)}</title></circle>"
            )
    parts.append("</svg>")
    legend = "".join(f'<span><i class="{s.colour}"></i>{escape(s.label)}</span>' for s in shown)
    return f'<p class="legend">{legend}</p>{"".join(parts)}'
