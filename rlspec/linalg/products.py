"""Matrix products as a CPU's BLAS likes them: widths whose rows are aligned, and a way around slow few-column paths."""

from __future__ import annotations

from torch import Tensor

#: Products of a multiple of so many columns have rows that begin with a cache line, and run a third faster than others.
ALIGNED = 16
# From this many columns on, both forms take the same time; below, MKL's transposed one takes up to six times longer.
_FEW = 12
# Below this width a block costs more in calls than its symmetry saves.
_SMALLEST_BLOCK = 384


def aligned(columns: int, most: int) -> int:
    """``columns`` rounded up to a multiple of `ALIGNED`, at most ``most``."""
    return min(most, -(-columns // ALIGNED) * ALIGNED)


def transposed_product(a: Tensor, x: Tensor) -> Tensor:
    """``aᵀ x`` for ``a`` (..., m, n) and ``x`` (..., m, c), shape (..., n, c)."""
    return (x.mT @ a).mT if x.shape[-1] < _FEW else a.mT @ x


def gram(a: Tensor, depth: int = 2) -> Tensor:
    """``aᵀ a``, shape (..., n, n), with 5/8 of the products by computing off-diagonal blocks once.

    Args:
        a: shape (..., m, n).
        depth: how often to halve the columns; torch exposes no ``syrk``.
    """
    n = a.shape[-1]
    if depth == 0 or n < 2 * _SMALLEST_BLOCK:
        return a.mT @ a
    half = n // 2
    out = a.new_empty(*a.shape[:-2], n, n)
    left, right = a[..., :half], a[..., half:]
    out[..., :half, :half] = gram(left, depth - 1)
    out[..., half:, half:] = gram(right, depth - 1)
    cross = left.mT @ right
    out[..., :half, half:] = cross
    out[..., half:, :half] = cross.mT
    return out
