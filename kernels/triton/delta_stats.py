"""delta_stats: the sums that metrics of E = W - W_ref start from, of many matrices in one launch; E too where asked for.

Memory bound: each weight is read once, each entry of E written at most once. The matrices stay where they are (in the
model, in the copy of the reference): the kernel finds them through a table of pointers, so matrices of any
shapes go in one launch. Each program reduces one tile to five partial sums, and a second launch adds those of each
matrix up in float64, in an order fixed by their number: no atomics, so no bit depends on the order in which programs run,
nor on the other matrices.

    L: matrices   T: tiles of all the matrices   BLOCK: entries of a tile
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.common import DTYPES, interpreted, to_bfloat16

_COLUMNS = 5  # of the partial sums: E², W², W_ref², changed, non-finite
_SUMMED = 1024  # tiles added at a time; a constant, on which the order of the additions hangs


class PairSums(NamedTuple):
    """Result of `delta_stats_triton`; L matrices."""

    delta_sq: Tensor  #: (L,) float64, ‖W - W_ref‖²_F before E is rounded to the dtype of ``out``
    tuned_sq: Tensor  #: (L,) float64, ‖W‖²_F
    base_sq: Tensor  #: (L,) float64, ‖W_ref‖²_F
    changed: Tensor  #: (L,) int64, entries with |w - w_ref| > eta * max(|w|, |w_ref|)
    nonfinite: (
        Tensor  #: (L,) int64, entries where w or w_ref is NaN or infinite; the sums are not finite then
    )


@triton.jit
def _delta_stats_kernel(
    table,  # int64 (L, 4): addresses of W, W_ref and E (or 0), and the number of entries
    tiles,  # int32 (T, 2): matrix, tile within the matrix
    partials,  # float32 (T, 5)
    eta,
    TUNED: tl.constexpr,
    BASE: tl.constexpr,
    OUT: tl.constexpr,  # dtype of E, or None: E is not stored
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes, every number of entries of 16
    INTERP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    matrix = tl.load(tiles + 2 * program)
    tile = tl.load(tiles + 2 * program + 1)
    row = table + 4 * matrix
    tuned = tl.load(row).to(tl.pointer_type(TUNED))
    base = tl.load(row + 1).to(tl.pointer_type(BASE))
    entries = tl.load(row + 3)
    if ALIGNED:  # what loads of 16 bytes need to know, the last being about the mask
        tuned = tl.multiple_of(tuned, 16)
        base = tl.multiple_of(base, 16)
        entries = tl.multiple_of(entries, 16)
    # 64 bits: the entries of a vocabulary's embedding times its width pass 2^31.
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    w = tl.load(tuned + at, mask=inside, other=0.0).to(tl.float32)
    w_ref = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    e = w - w_ref
    if OUT is not None:
        out = tl.load(row + 2).to(tl.pointer_type(OUT))
        if ALIGNED:
            out = tl.multiple_of(out, 16)
        if tl.bfloat16 == OUT:
            tl.store(out + at, to_bfloat16(e, INTERP), mask=inside)
        else:
            tl.store(out + at, e.to(OUT), mask=inside)
    larger = tl.maximum(tl.abs(w), tl.abs(w_ref))
    changed = (tl.abs(e) > eta * larger) & inside
    infinity = float("inf")
    finite = (tl.abs(w) < infinity) & (tl.abs(w_ref) < infinity)  # false for NaN
    partial = partials + 5 * program
    tl.store(partial, tl.sum(e * e))
    tl.store(partial + 1, tl.sum(w * w))
    tl.store(partial + 2, tl.sum(w_ref * w_ref))
    tl.store(partial + 3, tl.sum(changed.to(tl.float32)))
    tl.store(partial + 4, tl.sum((~finite).to(tl.float32)))


@triton.jit
def _sum_tiles_kernel(
    partials,  # float32 (T, 5)
    starts,  # int64 (L + 1,): first tile of each matrix, and past the last one's
    sums,  # float64 (L, 5)
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(0)
    column = tl.program_id(1)
    first = tl.load(starts + matrix)
    stop = tl.load(starts + matrix + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + 5 * at + column, mask=at < stop, other=0.0).to(tl.float64)
    tl.store(sums + 5 * matrix + column, tl.sum(total))


def delta_stats_triton(
    tuned: Sequence[Tensor],
    base: Sequence[Tensor],
    *,
    eta: float = 1e-3,
    out: Sequence[Tensor] | None = None,
    block: int = 4096,
    num_warps: int = 4,
) -> PairSums:
    """Norms and counts of E = W - W_ref for L matrices at once (see `PairSums`).

    Args:
        tuned: the L matrices W, contiguous, all of one dtype (float32, bfloat16 or float16), on one GPU (or on the
            CPU under Triton's interpreter).
        base: the L matrices W_ref, of the same shapes, all of one dtype.
        eta: an entry counts as changed where |w - w_ref| > eta * max(|w|, |w_ref|).
        out: where to write E, contiguous and of the matrices' shapes, all of one dtype; default: nowhere.
        block: entries a program works on, a power of two, at most 2^24 so that counts stay exact in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check(tuned, base, out)
    device = tuned[0].device
    places = [0] * len(tuned) if out is None else [e.data_ptr() for e in out]
    rows = [[w.data_ptr(), ref.data_ptr(), e, w.numel()] for w, ref, e in zip(tuned, base, places)]
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    counts = torch.tensor([triton.cdiv(w.numel(), block) for w in tuned], dtype=torch.int64, device="cpu")
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    owner = torch.repeat_interleave(counts)
    within = torch.arange(len(owner), device="cpu") - starts[owner]
    tiles = torch.stack([owner, within], dim=1).to(torch.int32).to(device)
    partials = torch.empty(len(owner), _COLUMNS, dtype=torch.float32, device=device)
    sums = torch.empty(len(tuned), _COLUMNS, dtype=torch.float64, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _delta_stats_kernel[(len(owner),)](
            table,
            tiles,
            partials,
            eta,
            TUNED=DTYPES[tuned[0].dtype],
            BASE=DTYPES[base[0].dtype],
            OUT=None if out is None else DTYPES[out[0].dtype],
            ALIGNED=all(value % 16 == 0 for row in rows for value in row),
            INTERP=interpreted(_delta_stats_kernel),
            BLOCK=block,
            num_warps=num_warps,
        )
        _sum_tiles_kernel[(len(tuned), _COLUMNS)](partials, starts.to(device), sums, BLOCK=_SUMMED)
    return PairSums(sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3].long(), sums[:, 4].long())


def _check(tuned: Sequence[Tensor], base: Sequence[Tensor], out: Sequence[Tensor] | None) -> None:
    if not tuned or len(tuned) != len(base):
        raise ValueError(f"expected as many tuned as base matrices, found {len(tuned)} and {len(base)}")
    for w, w_ref in zip(tuned, base):
        if w.shape != w_ref.shape or w.numel() == 0:
            raise ValueError(f"expected two equal, non-empty shapes, found {w.shape} and {w_ref.shape}")
        if w.dtype != tuned[0].dtype or w_ref.dtype != base[0].dtype:
            raise ValueError("expected one dtype for all tuned and one for all base matrices")
        if w.dtype not in DTYPES or w_ref.dtype not in DTYPES:
            raise ValueError(f"expected float32, bfloat16 or float16, found {w.dtype} and {w_ref.dtype}")
        if w.device != tuned[0].device or w_ref.device != tuned[0].device:
            raise ValueError("expected all matrices on one device")
        if not (w.is_contiguous() and w_ref.is_contiguous()):
            raise ValueError("expected contiguous matrices")
    for w, e in zip(tuned, out or ()):
        if e.shape != w.shape or not e.is_contiguous() or e.dtype not in DTYPES or e.device != w.device:
            raise ValueError(
                f"expected a contiguous out like {w.shape} on {w.device}, found {e.shape} on {e.device}"
            )
