"""What an engine hands back about a stack of matrices of one shape."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlspec.perturb.delta import UpdateStats
from rlspec.spectra.subspaces import Subspaces


@dataclass(frozen=True)
class Measurement:
    """Spectra of a stack of L current weights against their references; on the host, float64 unless said otherwise.

    A side whose k is its whole dimension has no angles (``None``): its leading subspace is everything.
    """

    update: UpdateStats
    sigma: Tensor  # (L, k) leading singular values of the current weight
    sines_left: Tensor | None  # (L, k) descending
    sines_right: Tensor | None  # (L, k) descending
    core: Tensor  # (L, k, k) U_kᵀ ΔW V_k in the reference basis
    blocks: Tensor  # (L, k) int64, the block of near-degenerate reference vectors of each
    block_at_cut: Tensor  # (L,) int64, size of the block that the cut at k splits, 0 where it splits none
    best_match_left: (
        Tensor  # (L, k) best |cosine| of each leading reference vector with a leading current one
    )
    best_match_right: Tensor  # (L, k) likewise
    best_cosine: Tensor  # (L, k) best |cosine| of each current left vector with a reference vector or block
    delta_spectral: Tensor  # (L,) ||ΔW||_2
    effective_rank: Tensor  # (L,)
    effective_rank_error_bound: Tensor  # (L,)
    sigma_error_bound: Tensor  # (L,) absolute, on every one of sigma
    angle_error_bound_rad: Tensor  # (L,) on every principal angle of both sides
    engine: tuple[str, ...]  # per matrix: "exact" or "delta"
    arithmetic: tuple[str, ...]  # per matrix: "float32", "float64" or "bfloat16", see ``table.COLUMNS``
    notes: tuple[str | None, ...]  # per matrix
    subspaces: Subspaces | None = None  # where they were asked for; on the reference's device

    def with_notes(self, note: str) -> Measurement:
        return replace(self, notes=(note,) * len(self.notes))


def combine(parts: list[tuple[list[int], Measurement]]) -> Measurement:
    """Join measurements of disjoint positions into one of all positions, in order."""
    places = [position for positions, _ in parts for position in positions]
    order = sorted(range(len(places)), key=places.__getitem__)
    joined = {f.name: _join([getattr(m, f.name) for _, m in parts]) for f in fields(Measurement)}
    return Measurement(**{name: _take(value, order) for name, value in joined.items()})


def _take(value: Any, positions: list[int]) -> Any:
    if isinstance(value, tuple):
        return tuple(value[i] for i in positions)
    if isinstance(value, Tensor):
        return value[positions]
    if value is None:
        return None
    if isinstance(value, Subspaces):
        return value.ordered(positions)
    # Not select, which leaves a whole stack in its order.
    return UpdateStats(*(getattr(value, f.name)[positions] for f in fields(UpdateStats)))


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, tuple):
        return tuple(item for value in values for item in value)
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, Subspaces):
        return Subspaces.joined(values)
    return None if first is None else UpdateStats.joined(values)
