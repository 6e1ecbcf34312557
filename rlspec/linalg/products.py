"""Matrix products as a CPU's BLAS likes them: widths whose rows are aligned, and a way around slow transposed factors."""

from __future__ import annotations

from torch import Tensor

#: Products of a multiple of so many columns have rows that begin with a cache line, and run a third faster than others.
ALIGNED = 16
# From this many columns on, both forms take the same time; below, MKL's with a transposed left factor takes up to twice
# as long, and of less than a dozen up to six times.
_FEW = 64


def aligned(columns: int, most: int) -> int:
    """``columns`` rounded up to a multiple of `ALIGNED`, at most ``most``."""
    return min(most, -(-columns // ALIGNED) * ALIGNED)


def product(a: Tensor, x: Tensor) -> Tensor:
    """``a x`` for ``a`` (..., m, n), which may be a transposed view, and ``x`` (..., n, c), shape (..., m, c)."""
    turned = a.stride(-1) != 1 and x.shape[-1] < _FEW
    return (x.mT @ a.mT).mT if turned else a @ x


def transposed_product(a: Tensor, x: Tensor) -> Tensor:
    """``aᵀ x`` for ``a`` (..., m, n) and ``x`` (..., m, c), shape (..., n, c)."""
    return product(a.mT, x)
