"""Powers of two that bring a matrix to where its Gram matrix neither overflows nor underflows.

Dividing by a power of two rounds nothing, so a scaled computation has the digits of the unscaled one.

Axes: ``...`` a batch, ``m`` rows, ``n`` columns, ``r`` values of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Entries between this and its inverse have sums of squares that float64 holds, with all their digits.
_SMALLEST = 2.0**-400


def powers_of_two(a: Tensor) -> Tensor:
    """The power of two next below the largest entry of each matrix (..., m, n), (...) in its dtype; 1 for zeros."""
    largest = a.abs().amax(dim=(-2, -1)).double()
    return torch.where(largest > 0, torch.exp2(largest.log2().floor()), torch.ones_like(largest)).to(a.dtype)


def into_range(a: Tensor) -> tuple[Tensor, Tensor | None]:
    """``a`` (..., m, n) float64 and None where its Gram matrix is in range; else ``a`` over powers of two, and them.

    On a device, where looking means waiting, it is divided anyway.
    """
    power = powers_of_two(a)
    if not a.is_cuda and bool(((power > _SMALLEST) & (power < 1 / _SMALLEST)).all()):
        return a, None
    return a / power[..., None, None], power


def multiplied(s: Tensor, power: Tensor | None) -> Tensor:
    """Values (..., r) of a matrix that :func:`into_range` has divided, as they were."""
    return s if power is None else s * power.unsqueeze(-1)
