"""The attention heads of q, k and v matrices, blocks of their rows, and of o, blocks of its columns: each a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlspec.errors import ProjectionError
from rlspec.io.fused import Config, Shape, head_counts
from rlspec.io.projections import Projection


def split_heads(
    projections: Sequence[Projection], shapes: Mapping[str, Shape], config: Config | None
) -> list[Projection]:
    """Each q and o by head, each k and v by the key-value heads that groups of queries share; the others as they are.

    What a head's queries attend to enters the o projection by columns of its own, as many as v has rows for a head.

    Args:
        shapes: shape of every tensor in the checkpoint.
        config: of the model, which alone knows how many heads there are.

    Raises:
        ProjectionError: there is no configuration, it does not say, or what it says does not fit the matrices.
    """
    found: list[Projection] = []
    sizes: dict[str, dict[int, tuple[str, str]]] = {"q and k": {}, "v and o": {}}
    for projection in projections:
        module = projection.module
        if module not in ("q", "k", "v", "o"):
            found.append(projection)
            continue
        if config is None:
            raise ProjectionError(
                f"{projection.name}: how many heads there are only config.json says, and there is none; measure whole "
                "matrices (per_head=False)"
            )
        queries, groups = head_counts(projection.name, config)
        heads = groups if module in ("k", "v") else queries
        rows, columns = projection.shape(shapes[projection.tensor])
        length, what = (columns, "columns") if module == "o" else (rows, "rows")
        size = _size(projection, f"{length} {what}", length, heads, config)
        pair = "q and k" if module in ("q", "k") else "v and o"
        sizes[pair].setdefault(size, (projection.name, what))
        split = _columns if module == "o" else _rows
        found += [split(projection, length, head, size) for head in range(heads)]
    for pair, kinds in sizes.items():
        if len(kinds) > 1:
            (first, (a, _)), (second, (b, what)) = list(kinds.items())[:2]
            raise ProjectionError(
                f"{b}: by config.json its heads have {second} {what} each, those of {a} {first}; {pair} must agree: "
                "measure whole matrices (per_head=False)"
            )
    return found


def _size(projection: Projection, told: str, length: int, heads: int, config: Config) -> int:
    """How many of the rows or columns, ``length`` of them, which messages call ``told``, a head has."""
    size, rest = divmod(length, heads)
    # Of v, head_dim is not to be trusted, as with latent attention; nor of o, where v has a size of its own.
    names = {"q": ("head_dim",), "k": ("head_dim",), "v": (), "o": ("v_head_dim", "head_dim")}
    said = next((config[n] for n in names[projection.module] if config.get(n) is not None), None)
    if rest or (said is not None and said != size):
        wanted = f"{heads} heads" + (f" of {said} {told.split()[1]}" if said is not None else "")
        raise ProjectionError(
            f"{projection.name}: {told} are not {wanted}, as config.json says; measure whole matrices (per_head=False)"
        )
    return size


def _named(projection: Projection, head: int) -> str:
    name = projection.name
    return f"{name[:-1]} head {head}]" if name.endswith("]") else f"{name}[head {head}]"


def _columns(projection: Projection, total: int, head: int, size: int) -> Projection:
    """One head of an o projection: ``size`` of its ``total`` columns."""
    assert projection.columns is None and total >= (head + 1) * size
    columns = slice(head * size, (head + 1) * size)
    return replace(projection, name=_named(projection, head), head=head, columns=columns)


def _rows(projection: Projection, total: int, head: int, size: int) -> Projection:
    """One head of a projection of ``total`` rows: ``size`` of them."""
    whole = slice(0, total) if projection.rows is None else projection.rows
    first, last, seen, rows = head * size, (head + 1) * size, 0, []
    for part in (whole,) if isinstance(whole, slice) else whole:
        start = part.start + max(0, first - seen)
        seen += part.stop - part.start
        stop = part.stop - max(0, seen - last)
        if start < stop:
            rows.append(slice(start, stop))
    parts = rows[0] if len(rows) == 1 else tuple(rows)
    return replace(projection, name=_named(projection, head), head=head, rows=parts)
