"""Products with few columns, where a BLAS's path for transposed operands can be several times slower."""

from __future__ import annotations

from torch import Tensor

# From this many columns on, both forms take the same time; below, MKL's transposed one takes up to six times longer.
_FEW = 12


def transposed_product(a: Tensor, x: Tensor) -> Tensor:
    """``aᵀ x`` for ``a`` (..., m, n) and ``x`` (..., m, c), shape (..., n, c)."""
    return (x.mT @ a).mT if x.shape[-1] < _FEW else a.mT @ x
