"""Norms of W, W_ref and E = W - W_ref, and the number of entries that did not move, in one pass over both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlspec.errors import TensorError
from rlspec.ops.table import choose

# Entries of a row block whose temporaries stay in a processor's cache; whole-matrix temporaries would each be written
# to fresh pages and read back.
_BLOCK = 1 << 18


class DeltaStats(NamedTuple):
    """Sums over the entries of L matrices that metrics of an update start from."""

    delta_sq: Tensor  #: (L,) float64, ||W - W_ref||²_F
    weight_sq: Tensor  #: (L,) float64, ||W||²_F
    reference_sq: Tensor  #: (L,) float64, ||W_ref||²_F
    unchanged: Tensor  #: (L,) int64, entries with |w - w_ref| <= eta max(|w|, |w_ref|)


def delta_stats(weight: Tensor, reference: Tensor, *, eta: float, out: Tensor | None = None) -> DeltaStats:
    """Norms and counts of E = W - W_ref of L matrices, and E itself where there is a place for it.

    The difference of two bfloat16 or float16 tensors is taken in float32, where it is exact, and otherwise in
    the wider of the two dtypes, where its error is relative to the difference and not to the weight.

    Args:
        weight, reference: (L, m, n), any floating dtypes, on one device.
        eta: an entry is unchanged where |w - w_ref| <= eta max(|w|, |w_ref|).
        out: (L, m, n), where to write E; of :func:`delta_dtype`.

    Raises:
        TensorError: shapes that differ or are not three-dimensional; an ``out`` that does not fit.
    """
    if weight.ndim != 3 or weight.shape != reference.shape:
        raise TensorError(
            f"expected two stacks of one shape (L, m, n), found {tuple(weight.shape)} and {tuple(reference.shape)}"
        )
    dtype = delta_dtype(weight, reference)
    if out is not None and (out.shape != weight.shape or out.dtype != dtype):
        raise TensorError(
            f"expected an out of shape {tuple(weight.shape)} in {dtype}, found {tuple(out.shape)} in {out.dtype}"
        )
    chosen = choose("delta_stats", weight.device, (weight.dtype, reference.dtype), weight.shape)
    return _IMPLEMENTATIONS[chosen](weight, reference, eta, out)


def delta_dtype(weight: Tensor, reference: Tensor) -> torch.dtype:
    """Of E: float64 where one of the two is, float32 otherwise."""
    return torch.float64 if torch.float64 in (weight.dtype, reference.dtype) else torch.float32


def _by_row_blocks(weight: Tensor, reference: Tensor, eta: float, out: Tensor | None) -> DeltaStats:
    matrices, m, n = weight.shape
    dtype = delta_dtype(weight, reference)
    sums = torch.zeros(3, matrices, dtype=torch.float64, device=weight.device)
    unchanged = torch.zeros(matrices, dtype=torch.int64, device=weight.device)
    rows = min(m, max(1, _BLOCK // max(n, 1)))
    scratch = torch.empty(3, rows, n, dtype=dtype, device=weight.device)
    small = torch.empty(rows, n, dtype=torch.bool, device=weight.device)
    for i in range(matrices):
        for start in range(0, m, rows):
            block = slice(start, start + rows)
            w, ref = weight[i, block].to(dtype), reference[i, block].to(dtype)
            larger, size, unkept = scratch[:, : w.shape[0]]
            e = torch.sub(w, ref, out=unkept if out is None else out[i, block])
            # Rows are summed in the dtype, their totals in float64.
            norms = torch.stack([torch.linalg.vector_norm(x, dim=-1) for x in (e, w, ref)])
            sums[:, i] += norms.double().square().sum(-1)
            torch.maximum(torch.abs(w, out=larger), torch.abs(ref, out=size), out=larger).mul_(eta)
            torch.le(torch.abs(e, out=size), larger, out=small[: e.shape[0]])
            unchanged[i] += torch.count_nonzero(small[: e.shape[0]])
    return DeltaStats(sums[0], sums[1], sums[2], unchanged)


def _whole(weight: Tensor, reference: Tensor, eta: float, out: Tensor | None) -> DeltaStats:
    dtype = delta_dtype(weight, reference)
    w, ref = weight.to(dtype), reference.to(dtype)
    delta = torch.sub(w, ref, out=out)
    unchanged = delta.abs() <= eta * torch.maximum(w.abs(), ref.abs())
    norms = torch.stack([torch.linalg.vector_norm(x, dim=-1) for x in (delta, w, ref)])
    delta_sq, weight_sq, reference_sq = norms.double().square().sum(-1)
    return DeltaStats(delta_sq, weight_sq, reference_sq, torch.count_nonzero(unchanged, dim=(-2, -1)))


def _by_kernel(weight: Tensor, reference: Tensor, eta: float, out: Tensor | None) -> DeltaStats:
    from rlspec.kernels.delta_stats import delta_stats_triton

    pair = weight.contiguous().unbind(), reference.contiguous().unbind()
    found = delta_stats_triton(*pair, eta=eta, out=None if out is None else out.unbind())
    return DeltaStats(found.delta_sq, found.tuned_sq, found.base_sq, weight[0].numel() - found.changed)


_IMPLEMENTATIONS = {"triton": _by_kernel, "whole": _whole, "row blocks": _by_row_blocks}
