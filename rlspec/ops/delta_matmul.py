"""Products with E = W - W_ref from both sides, E formed where it is multiplied and never kept.

Axes: ``L`` matrices, ``m`` by ``n`` each; ``c`` columns of the block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlspec.backend import row_blocks
from rlspec.errors import TensorError
from rlspec.ops.table import choose

# Entries of E formed at once.
_BLOCK = 1 << 21


def delta_matmul(weight: Tensor, reference: Tensor, x: Tensor) -> Tensor:
    """``(W - W_ref) x`` of L matrices.

    Args:
        weight, reference: (L, m, n), any floating dtypes, on one device.
        x: (L, n, c), float32 or float64: the dtype in which E is taken and multiplied. The difference of two bfloat16
            or float16 numbers is exact in either.

    Returns:
        (L, m, c) in the dtype of ``x``.

    Raises:
        TensorError: shapes that do not fit each other.
    """
    _check(weight, reference, x, "x", weight.shape[-1])
    if in_kernel(weight, reference, x.dtype, x.shape[-1]):
        from rlspec.kernels.delta_matmul import delta_matmul_triton

        return delta_matmul_triton(weight, reference, x)
    out = x.new_empty(*weight.shape[:-1], x.shape[-1])
    for rows in _blocks(weight):
        out[:, rows] = (weight[:, rows].to(x.dtype) - reference[:, rows].to(x.dtype)) @ x
    return out


def delta_rmatmul(weight: Tensor, reference: Tensor, y: Tensor) -> Tensor:
    """``(W - W_ref)ᵀ y`` for ``y`` (L, m, c), shape (L, n, c); otherwise as :func:`delta_matmul`."""
    _check(weight, reference, y, "y", weight.shape[-2])
    if in_kernel(weight, reference, y.dtype, y.shape[-1]):
        from rlspec.kernels.delta_matmul import delta_rmatmul_triton

        return delta_rmatmul_triton(weight, reference, y)
    out = y.new_zeros(weight.shape[0], weight.shape[-1], y.shape[-1])
    for rows in _blocks(weight):
        out += (weight[:, rows].to(y.dtype) - reference[:, rows].to(y.dtype)).mT @ y[:, rows]
    return out


def in_kernel(weight: Tensor, reference: Tensor, dtype: torch.dtype, columns: int = 1) -> bool:
    """Whether products of the pair with ``columns`` of ``dtype`` form E in registers, so that storing it is in vain."""
    dtypes = weight.dtype, reference.dtype, dtype
    return choose("delta_matmul", weight.device, dtypes, (*weight.shape, columns)) == "triton"


def _check(weight: Tensor, reference: Tensor, block: Tensor, name: str, rows: int) -> None:
    if weight.ndim != 3 or weight.shape != reference.shape or block.ndim != 3:
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, reference, block))
        raise TensorError(f"expected two stacks of one shape (L, m, n) and a block (L, ., c), found {shapes}")
    if block.shape[:2] != (weight.shape[0], rows):
        raise TensorError(
            f"expected {name} of shape ({weight.shape[0]}, {rows}, c) for matrices {tuple(weight.shape)}, "
            f"found {tuple(block.shape)}"
        )


def _blocks(weight: Tensor) -> Iterator[slice]:
    matrices, m, n = weight.shape
    return row_blocks(m, matrices * n, _BLOCK)
