"""Layer × event heat maps: where every cell is drawn and in which colour. The template draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlspec.report.chart import Place

#: Dark to bright, evenly spaced in lightness, readable without colour vision.
_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_LEFT, _TOP = 30, 19  # of the first cell
_LABEL, _LETTER = 24, 6.6  # of a column: its longest text, the width of a letter


@dataclass(frozen=True)
class Cell:
    """A cell by its upper left corner; ``fill`` is its colour."""

    x: float
    y: float
    fill: str
    text: str


@dataclass(frozen=True)
class HeatMap:
    """A map of ``width`` by ``height``, with cells of ``wide`` by ``high``."""

    title: str
    width: float
    height: float
    wide: float
    high: float
    cells: Sequence[Cell]
    layers: Sequence[Place]  # labels of the rows
    ends: Sequence[Place]  # labels of the first and the last column; one where they are the same


@dataclass(frozen=True)
class ColourBar:
    """The key of a map: colours at equal distances, from ``low`` to ``high``."""

    colours: Sequence[str]
    low: str
    high: str


def colour(share: float) -> str:
    """A colour for a value in [0, 1]."""
    position = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    i = min(int(position), len(_STOPS) - 2)
    mixed = (a + (b - a) * (position - i) for a, b in zip(_STOPS[i], _STOPS[i + 1]))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def heatmap(
    cells: Mapping[tuple[int | None, int], float],
    *,
    layers: Sequence[int | None],
    columns: Sequence[str],
    top: float,
    value_format: Callable[[float], str],
    title: str,
) -> HeatMap:
    """One map: rows are layers, columns are events, ``cells[layer, column index]`` values in [0, top].

    Args:
        layers: None for a matrix of no layer, such as ``lm_head``; it is told by the title alone.
    """
    # Few columns are wide enough for the title above them and the two labels below.
    ends = [
        name if len(name) <= _LABEL else f"…{name[1 - _LABEL :]}"
        for name in columns[:: len(columns) - 1 or 1]
    ]
    room = max(150.0, _LETTER * sum(map(len, ends)) + 10)
    wide = max(6.0, min(26.0, 330 / len(columns)), room / len(columns))
    high = max(4.0, min(20.0, 300 / len(layers)))
    label_every = max(1, round(14 / high))
    placed, labels = [], []
    for row, layer in enumerate(layers):
        y = _TOP + row * high
        if row % label_every == 0 and layer is not None:
            labels.append(Place(_LEFT - 5, y + high / 2 + 4, str(layer)))
        for column, name in enumerate(columns):
            value = cells.get((layer, column))
            if value is not None:
                fill = colour(value / top if top > 0 else 0.0)
                where = name if layer is None else f"layer {layer}, {name}"
                text = f"{where}: {value_format(value)}"
                placed.append(Cell(_LEFT + column * wide, y, fill, text))
    bottom = _TOP + len(layers) * high + 14
    return HeatMap(
        title=title,
        width=_LEFT + wide * len(columns) + 4,
        height=_TOP + high * len(layers) + 22,
        wide=wide,
        high=high,
        cells=placed,
        layers=labels,
        ends=[Place(_LEFT + i * wide * len(columns), bottom, name) for i, name in enumerate(ends)],
    )


def colour_bar(top: float, value_format: Callable[[float], str]) -> ColourBar:
    """The key of a map: 0 to ``top``."""
    return ColourBar([colour(i / 8) for i in range(9)], value_format(0.0), value_format(top))
