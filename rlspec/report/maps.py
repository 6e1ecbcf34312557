"""The heat maps of a run: rotation and change of the singular values, by layer and event."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rlspec.report.data import Row, RunData, by_event, event_name
from rlspec.report.heatmap import ColourBar, HeatMap, colour_bar, heatmap
from rlspec.run.rows import rotation

# Of a heat map, and of all on a page, which would load and scroll slowly; longer runs are thinned evenly.
_MOST_COLUMNS, _LEAST_COLUMNS, _MOST_CELLS = 60, 8, 30_000


def maps(run: RunData) -> list[tuple[str, ColourBar, list[HeatMap]]]:
    """(title, key, one map per projection), all maps of a title on one scale; none where nothing was measured."""
    groups = list(by_event(run.spectra).items())
    if not groups:
        return []
    rows_of_all = 2 * len({(row["module"], row.get("layer")) for row in run.spectra})
    most = min(_MOST_COLUMNS, max(_LEAST_COLUMNS, _MOST_CELLS // rows_of_all))
    stride = -(-len(groups) // most)
    kept = [g for i, g in enumerate(groups) if (len(groups) - 1 - i) % stride == 0]
    several = len({segment for (segment, _), _ in groups}) > 1
    columns = [
        event_name(rows[0], f"{segment} {step}" if several else f"step {step}")
        for (segment, step), rows in kept
    ]
    thinned = f"; {len(kept)} of {len(groups)} checkpoints, evenly spaced" if stride > 1 else ""
    sections = []
    kinds: tuple[tuple[str, Callable[[Row], float | None], Callable[[float], str]], ...] = (
        ("Rotation (mean angle, rad)", rotation, lambda v: f"{v:.3g} rad"),
        (
            "Singular-value change (mean, relative)",
            lambda r: r.get("sigma_change_rel_mean"),
            lambda v: f"{100 * v:.2g} %",
        ),
    )
    for title, value_of, value_format in kinds:
        # A layer may have several matrices of a module, such as those of the MLP, or its heads.
        values: dict[str, dict[tuple[int | None, int], list[float]]] = {}
        for column, (_, rows) in enumerate(kept):
            for row in rows:
                value = value_of(row)
                if value is not None:
                    place = row.get("layer"), column
                    values.setdefault(row["module"], {}).setdefault(place, []).append(value)
        cells = {
            module: {place: math.fsum(several) / len(several) for place, several in found.items()}
            for module, found in values.items()
        }
        if not cells:
            continue
        top = max(value for module in cells.values() for value in module.values())
        drawn = [
            heatmap(
                found, layers=sorted({layer for layer, _ in found}, key=lambda i: -1 if i is None else i),
                columns=columns, top=top, value_format=value_format, title=_title(module, found),
            )
            for module, found in cells.items()
        ]  # fmt: skip
        sections.append((title + thinned, colour_bar(top, value_format), drawn))
    return sections


def _title(module: str, cells: Mapping[tuple[int | None, int], float]) -> str:
    return f"{module}: " + ("by event" if all(layer is None for layer, _ in cells) else "layer by event")
