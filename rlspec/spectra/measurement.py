"""What an engine is given and what it hands back: stacks of matrices of one shape."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlspec.spectra.matrix import MatrixBasis
from rlspec.spectra.metrics import Update
from rlspec.spectra.sources import stack


@dataclass(frozen=True)
class ReferenceStack:
    """Reference factors of L matrices of one shape, dtype and rank k, stacked for batched products.

    ``W`` (L, m, n) in the checkpoint's dtype; ``U`` (L, m, r), ``Vh`` (L, r, n) float64 or float32; ``S``
    (L, r) float64. A stack of one shares the memory of its :class:`MatrixBasis`.
    """

    names: tuple[str, ...]
    W: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor
    k: int

    @classmethod
    def of(cls, matrices: list[MatrixBasis]) -> ReferenceStack:
        return cls(
            names=tuple(m.name for m in matrices),
            W=stack([m.W for m in matrices]),
            U=stack([m.U for m in matrices]),
            S=stack([m.S for m in matrices]),
            Vh=stack([m.Vh for m in matrices]),
            k=matrices[0].k,
        )

    def select(self, index: Tensor) -> ReferenceStack:
        """The matrices of the given positions; all of them without a copy."""
        if index.numel() == self.S.shape[0]:
            return self
        names = tuple(self.names[i] for i in index.tolist())
        return ReferenceStack(names, self.W[index], self.U[index], self.S[index], self.Vh[index], self.k)

    def in_float32(self) -> ReferenceStack:
        """The same with U and Vh in float32."""
        return replace(self, U=self.U.float(), Vh=self.Vh.float())

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.W.shape[-2]), int(self.W.shape[-1])


@dataclass(frozen=True)
class Measurement:
    """Spectra of a stack of L current weights against their references; float64 unless said otherwise.

    A side whose k is its whole dimension has no angles (``None``): its leading subspace is everything.
    """

    update: Update
    sigma: Tensor  # (L, k) leading singular values of the current weight
    sines_left: Tensor | None  # (L, k) descending
    sines_right: Tensor | None  # (L, k) descending
    core: Tensor  # (L, k, k) U_kᵀ ΔW V_k in the reference basis
    blocks: Tensor  # (L, k) int64, the block of near-degenerate reference vectors of each
    block_at_cut: Tensor  # (L,) int64, size of the block that the cut at k splits, 0 where it splits none
    best_cosine: Tensor  # (L, k) best |cosine| of each current left vector with a reference vector or block
    delta_spectral: Tensor  # (L,) ||ΔW||_2
    effective_rank: Tensor  # (L,)
    effective_rank_error_bound: Tensor  # (L,)
    sigma_error_bound: Tensor  # (L,) absolute, on every one of sigma
    angle_error_bound_rad: Tensor  # (L,) on every principal angle of both sides
    engine: tuple[str, ...]  # per matrix: "exact" or "delta"
    arithmetic: tuple[str, ...]  # per matrix: dtype of the products with the update, "float32" or "float64"
    notes: tuple[str | None, ...]  # per matrix

    def select(self, index: Tensor) -> Measurement:
        """The matrices of the given positions."""
        chosen = {f.name: _take(getattr(self, f.name), index) for f in fields(self)}
        return Measurement(**chosen)

    def with_notes(self, note: str) -> Measurement:
        return replace(self, notes=(note,) * len(self.notes))


def combine(parts: list[tuple[Tensor, Measurement]]) -> Measurement:
    """Join measurements of disjoint positions into one of all positions, in order."""
    order = torch.argsort(torch.cat([index for index, _ in parts]))
    joined = {f.name: _join([getattr(m, f.name) for _, m in parts]) for f in fields(Measurement)}
    return Measurement(**joined).select(order)


def _take(value: Any, index: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(value[i] for i in index.tolist())
    return value if value is None else value[index] if isinstance(value, Tensor) else value.select(index)


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, tuple):
        return tuple(item for value in values for item in value)
    if isinstance(first, Tensor):
        return torch.cat(values)
    return None if first is None else Update.joined(values)
