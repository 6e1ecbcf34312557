"""Layer × step heat maps as inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

#: Dark to bright, evenly spaced in lightness, readable without colour vision.
_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def colour(share: float) -> str:
    """A colour for a value in [0, 1]."""
    position = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    i = min(int(position), len(_STOPS) - 2)
    mixed = (a + (b - a) * (position - i) for a, b in zip(_STOPS[i], _STOPS[i + 1]))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def heatmap(
    cells: Mapping[tuple[int, int], float],
    *,
    layers: Sequence[int],
    columns: Sequence[str],
    top: float,
    value_format: Callable[[float], str],
    title: str,
) -> str:
    """One map: rows are layers, columns are events, ``cells[layer, column index]`` values in [0, top]."""
    wide, high, left = max(6.0, min(26.0, 330 / len(columns))), max(4.0, min(20.0, 300 / len(layers))), 30
    width, height = left + wide * len(columns) + 4, high * len(layers) + 38
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width: {1.3 * width:.0f}px"'
    parts = [f'<svg {size} role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="{left}" y="11">{escape(title)}</text>')
    label_every = max(1, round(14 / high))
    for row, layer in enumerate(layers):
        y = 16 + row * high
        if row % label_every == 0:
            parts.append(f'<text x="{left - 5}" y="{y + high / 2 + 4:.1f}" text-anchor="end">{layer}</text>')
        for column, name in enumerate(columns):
            value = cells.get((layer, column))
            if value is None:
                continue
            fill = colour(value / top if top > 0 else 0.0)
            parts.append(
                f'<rect x="{left + column * wide:.1f}" y="{y:.1f}" width="{wide + 0.3:.1f}" '
                f'height="{high + 0.3:.1f}" fill="{fill}"><title>layer {layer}, {escape(name)}: '
                f"{value_format(value)}</title></rect>"
            )
    bottom = 16 + len(layers) * high + 14
    for column in {0, len(columns) - 1}:
        anchor = "start" if column == 0 else "end"
        x = left + (0 if column == 0 else wide * len(columns))
        parts.append(
            f'<text x="{x:.0f}" y="{bottom:.0f}" text-anchor="{anchor}">{escape(columns[column])}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def colour_bar(top: float, value_format: Callable[[float], str]) -> str:
    """The key of a map: 0 to ``top``."""
    stops = ", ".join(colour(i / 8) for i in range(9))
    return (
        f'<p class="bar"><span>{value_format(0.0)}</span>'
        f'<i style="background: linear-gradient(to right, {stops})"></i><span>{value_format(top)}</span></p>'
    )
