"""Gram matrices AᵀA, each pair of columns multiplied once as far as the device's products allow."""

from __future__ import annotations

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
