"""How much of a model the projections that were found cover."""

from __future__ import annotations

from collections.abc import Iterable

from rlspec.io.projections import Projection, layer_of
from rlspec.io.stacks import in_tower


def partly_found(projections: Iterable[Projection], names: Iterable[str]) -> str | None:
    """What to tell where only some of a model's layers hold the projections found, as in hybrids of attention and
    state-space layers; None where all do.

    Args:
        projections: as `find_projections` gives them.
        names: every tensor of the checkpoint.
    """
    layers = {layer for name in names if not in_tower(name) and (layer := layer_of(name)) is not None}
    held: dict[str, set[int]] = {}
    for projection in projections:
        if projection.layer is not None:
            held.setdefault(projection.module, set()).add(projection.layer)
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for module, found in held.items():
        if found < layers:
            by_layers.setdefault(tuple(sorted(found)), []).append(module)
    return (
        "; ".join(
            f"only {len(found)} of {len(layers)} layers hold {', '.join(modules)}: {', '.join(map(str, found))}"
            for found, modules in by_layers.items()
        )
        or None
    )
