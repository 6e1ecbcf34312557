"""The attention heads of q, k and v matrices: blocks of their rows, each a matrix of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlspec.errors import ProjectionError
from rlspec.io.fused import Config, Shape, head_counts
from rlspec.io.projections import Projection


def split_heads(
    projections: Sequence[Projection], shapes: Mapping[str, Shape], config: Config | None
) -> list[Projection]:
    """Each q by head, each k and v by the key-value heads that groups of queries share; the others as they are.

    Args:
        shapes: shape of every tensor in the checkpoint.
        config: of the model, which alone knows how many heads there are.

    Raises:
        ProjectionError: there is no configuration, it does not say, or what it says does not fit the rows.
    """
    found: list[Projection] = []
    sizes: dict[int, str] = {}
    for projection in projections:
        if projection.module not in ("q", "k", "v"):
            found.append(projection)
            continue
        if config is None:
            raise ProjectionError(
                f"{projection.name}: how many heads there are only config.json says, and there is none; measure whole "
                "matrices (per_head=False)"
            )
        queries, groups = head_counts(projection.name, config)
        heads = queries if projection.module == "q" else groups
        rows, _ = projection.shape(shapes[projection.tensor])
        size, rest = divmod(rows, heads)
        told = config.get("head_dim") if projection.module != "v" else None
        if rest or (told is not None and told != size):
            wanted = f"{heads} heads" + (f" of {told} rows" if told is not None else "")
            raise ProjectionError(
                f"{projection.name}: {rows} rows are not {wanted}, as config.json says; measure whole matrices "
                "(per_head=False)"
            )
        if projection.module != "v":
            sizes.setdefault(size, projection.name)
        found += [_head(projection, rows, head, size) for head in range(heads)]
    if len(sizes) > 1:
        (first, a), (second, b) = list(sizes.items())[:2]
        raise ProjectionError(
            f"{b}: by config.json its heads have {second} rows each, those of {a} {first}; q and k must agree: measure "
            "whole matrices (per_head=False)"
        )
    return found


def _head(projection: Projection, total: int, head: int, size: int) -> Projection:
    """One head of a projection of ``total`` rows: ``size`` of them."""
    name = projection.name
    name = f"{name[:-1]} head {head}]" if name.endswith("]") else f"{name}[head {head}]"
    whole = slice(0, total) if projection.rows is None else projection.rows
    first, last, seen, rows = head * size, (head + 1) * size, 0, []
    for part in (whole,) if isinstance(whole, slice) else whole:
        start = part.start + max(0, first - seen)
        seen += part.stop - part.start
        stop = part.stop - max(0, seen - last)
        if start < stop:
            rows.append(slice(start, stop))
    return replace(projection, name=name, head=head, rows=rows[0] if len(rows) == 1 else tuple(rows))
