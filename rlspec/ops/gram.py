"""Gram matrices AᵀA, each pair of columns multiplied once as far as the device's products allow."""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.ops.table import choose

# Below this width a block costs more in calls than its symmetry saves.
_SMALLEST_BLOCK = 384


def gram(a: Tensor) -> Tensor:
    """``aᵀ a``, shape (..., n, n), in the dtype of ``a`` (..., m, n), float32 or float64."""
    m, n = a.shape[-2:]
    matrices = a.shape[:-2].numel()
    if choose("gram", a.device, (a.dtype,), (matrices, m, n)) == "triton":
        from rlspec.kernels.gram import gram_triton

        return gram_triton(a.reshape(matrices, m, n)).reshape(*a.shape[:-2], n, n)
    return _by_halves(a, 2)


def product_eps(device: torch.device, dtype: torch.dtype) -> float:
    """What products of such matrices round to, relative to the sum of the sizes of their terms, as bounds count it.

    NVIDIA's tensor cores multiply float32 as three products of split factors, which lose some 2^-21 where float32 itself
    loses 2^-24, and cut off the sums of a tile towards zero: terms of one sign lose some 2^-22, all to one side.
    """
    by_kernel = choose("gram", device, (dtype,), (1, 1, 1)) == "triton"
    return (
        2.0**-20
        if by_kernel and device.type == "cuda" and torch.version.hip is None
        else torch.finfo(dtype).eps
    )


def _by_halves(a: Tensor, depth: int) -> Tensor:
    """With 5/8 of the products at depth 2, off-diagonal blocks being computed once; torch exposes no ``syrk``."""
    n = a.shape[-1]
    if depth == 0 or n < 2 * _SMALLEST_BLOCK:
        return a.mT @ a
    half = n // 2
    out = a.new_empty(*a.shape[:-2], n, n)
    left, right = a[..., :half], a[..., half:]
    out[..., :half, :half] = _by_halves(left, depth - 1)
    out[..., half:, half:] = _by_halves(right, depth - 1)
    cross = left.mT @ right
    out[..., :half, half:] = cross
    out[..., half:, :half] = cross.mT
    return out
