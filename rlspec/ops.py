"""Operations with a Triton kernel on a GPU and a cache-blocked torch version on a CPU; the same but for rounding.

The choice is :func:`rlspec.backend.backend_for`'s. Each operation has a plain float64 twin in
:mod:`rlspec.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlspec.backend import backend_for
from rlspec.errors import TensorError
from rlspec.reference import DeltaSums

# Entries of a row block whose temporaries stay in a processor's cache; whole-matrix temporaries would each be written
# to fresh pages and read back.
_BLOCK = 1 << 18


def delta_prep(weight: Tensor, reference: Tensor, *, eta: float) -> DeltaSums:
    """E = W - W_ref of L matrices, with norms and the number of entries that did not move, in one pass.

    The difference of two bfloat16 or float16 tensors is taken in float32, where it is exact, and otherwise in
    the wider of the two dtypes, where its error is relative to the difference and not to the weight.

    Args:
        weight, reference: (L, m, n), any floating dtypes, on one device.
        eta: an entry is unchanged where |w - w_ref| <= eta max(|w|, |w_ref|).

    Returns:
        See :class:`DeltaSums`; ``delta`` is float64 where one of the inputs is, float32 otherwise.

    Raises:
        TensorError: shapes that differ or are not three-dimensional.
    """
    if weight.ndim != 3 or weight.shape != reference.shape:
        raise TensorError(
            f"expected two stacks of one shape (L, m, n), found {tuple(weight.shape)} and {tuple(reference.shape)}"
        )
    wide = torch.float64 in (weight.dtype, reference.dtype)
    if not wide and weight.numel() > 0 and backend_for(weight.device) == "triton":
        return _delta_prep_triton(weight, reference, eta)
    dtype = torch.float64 if wide else torch.float32
    by = _delta_prep_whole if weight.is_cuda else _delta_prep_blocks
    return by(weight, reference, eta, dtype)


def _delta_prep_blocks(weight: Tensor, reference: Tensor, eta: float, dtype: torch.dtype) -> DeltaSums:
    matrices, m, n = weight.shape
    delta = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    sums = torch.zeros(3, matrices, dtype=torch.float64, device=weight.device)
    unchanged = torch.zeros(matrices, dtype=torch.int64, device=weight.device)
    rows = min(m, max(1, _BLOCK // max(n, 1)))
    scratch = torch.empty(2, rows, n, dtype=dtype, device=weight.device)
    small = torch.empty(rows, n, dtype=torch.bool, device=weight.device)
    for i in range(matrices):
        for start in range(0, m, rows):
            block = slice(start, start + rows)
            w, ref = weight[i, block].to(dtype), reference[i, block].to(dtype)
            e = torch.sub(w, ref, out=delta[i, block])
            # Rows are summed in the dtype, their totals in float64.
            norms = torch.stack([torch.linalg.vector_norm(x, dim=-1) for x in (e, w, ref)])
            sums[:, i] += norms.double().square().sum(-1)
            larger, size = scratch[:, : e.shape[0]]
            torch.maximum(torch.abs(w, out=larger), torch.abs(ref, out=size), out=larger).mul_(eta)
            torch.le(torch.abs(e, out=size), larger, out=small[: e.shape[0]])
            unchanged[i] += torch.count_nonzero(small[: e.shape[0]])
    return DeltaSums(delta, sums[0], sums[1], sums[2], unchanged)


def _delta_prep_whole(weight: Tensor, reference: Tensor, eta: float, dtype: torch.dtype) -> DeltaSums:
    w, ref = weight.to(dtype), reference.to(dtype)
    delta = w - ref
    unchanged = delta.abs() <= eta * torch.maximum(w.abs(), ref.abs())
    delta_sq, weight_sq, reference_sq = (
        torch.linalg.vector_norm(x, dim=-1).double().square().sum(-1) for x in (delta, w, ref)
    )
    return DeltaSums(delta, delta_sq, weight_sq, reference_sq, torch.count_nonzero(unchanged, dim=(-2, -1)))


def _delta_prep_triton(weight: Tensor, reference: Tensor, eta: float) -> DeltaSums:
    from rlspec.kernels.delta import delta_prep_triton

    weight, reference = weight.contiguous(), reference.contiguous()
    delta = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    found = delta_prep_triton(weight.unbind(), reference.unbind(), eta=eta, out=delta.unbind())
    unchanged = weight[0].numel() - found.changed
    return DeltaSums(delta, found.delta_sq, found.tuned_sq, found.base_sq, unchanged)


def delta_matmul(weight: Tensor, reference: Tensor, x: Tensor) -> Tensor:
    """``(W - W_ref) x`` of L matrices, the difference formed some rows at a time and never kept.

    Args:
        weight, reference: (L, m, n), any floating dtypes, on one device; see :func:`delta_prep`.
        x: (L, n, c), float32 or float64: the dtype of the products.

    Returns:
        (L, m, c) in the dtype of ``x``.
    """
    out = x.new_empty(*weight.shape[:-1], x.shape[-1])
    for rows in _row_blocks(weight):
        out[:, rows] = (weight[:, rows].to(x.dtype) - reference[:, rows].to(x.dtype)) @ x
    return out


def delta_rmatmul(weight: Tensor, reference: Tensor, y: Tensor) -> Tensor:
    """``(W - W_ref)ᵀ y`` for ``y`` (L, m, c), shape (L, n, c); otherwise as :func:`delta_matmul`."""
    out = y.new_zeros(weight.shape[0], weight.shape[-1], y.shape[-1])
    for rows in _row_blocks(weight):
        out += (weight[:, rows].to(y.dtype) - reference[:, rows].to(y.dtype)).mT @ y[:, rows]
    return out


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    matrices, m, n = weight.shape
    rows = max(1, _BLOCK * 8 // max(matrices * n, 1))
    return (slice(start, start + rows) for start in range(0, m, rows))
