"""add_rounded: a change added to a stack of weights, rounded and summed up in one pass over them.

The change is stored, or low-rank and formed in registers: restoring directions then reads W and two thin factors and
writes W'. Sums are taken in float64, entry by entry, as on the CPU, and random numbers come by counter
(:mod:`rlspec.ops.draws`): for the same change the bits are those of the CPU path. Each program owns a tile and a row of
the partial sums: no atomics. In place where the result is the weight's own memory.

    L: matrices, (m, n) each   c: columns of the factors
    BR, BC, BK: tiles of rows, of columns, of the inner dimension c
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.common import DTYPES, interpreted, to_bfloat16, to_float64
from rlspec.kernels.configs import NEAREST, Config, Precision, family_of, rounding_config
from rlspec.kernels.philox import eight, key_of


@triton.jit
def _uniform(row, counter, counters, k0, k1, BR: tl.constexpr, BC: tl.constexpr):
    """(BR, BC) float64 in (0, 1), of rows and of eight columns a counter."""
    place = (row[:, None] * counters + counter[None, :]).to(tl.uint64)
    numbers = tl.reshape(eight(place, place * 0, k0, k1), (BR, BC))
    return (numbers.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def _to(x, TO: tl.constexpr, INTERP: tl.constexpr):
    """float64 to nearest by way of float32, as torch converts."""
    single = x.to(tl.float32)
    if tl.bfloat16 == TO:
        return to_bfloat16(single, INTERP)
    return single.to(TO)


@triton.jit
def _next(x, TO: tl.constexpr, UP: tl.constexpr):
    """The next number of the dtype above or below, of its bits. A zero has the sign of what was rounded to it, so its
    neighbour on the other side is not asked for."""
    BITS: tl.constexpr = tl.int32 if tl.float32 == TO else tl.int16
    bits = x.to(BITS, bitcast=True)
    ones = bits * 0 + 1
    away = (bits >= 0) if UP else (bits < 0)
    return tl.where(away, bits + ones, bits - ones).to(BITS).to(TO, bitcast=True)


@triton.jit
def _add_rounded_kernel(
    tuned,  # W (L, m, n), rows without gaps
    change,  # (L, m, n) float32, likewise; with factors left (L, m, c)
    right,  # (L, n, c) float32, likewise; unused without factors
    out,  # W' (L, m, n), likewise; may be W
    sums,  # (L, tiles, 4) float64: squares of change, loss and weight, and entries changed
    strength,  # one float64
    keys,  # (L, 2) int64; unused without draws
    M,
    N,
    C,
    first,  # row of the matrix that the draws are of
    tuned_matrix,  # strides in entries
    tuned_row,
    change_matrix,
    change_row,
    right_matrix,
    right_row,
    out_matrix,
    out_row,
    FACTORS: tl.constexpr,
    DRAWS: tl.constexpr,
    SAME: tl.constexpr,  # W and W' have one dtype
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    column_tiles = tl.cdiv(N, BC)
    tile = tl.program_id(0)
    # 64 bits throughout: a stack of a model's matrices passes 2^31 entries.
    matrix = tl.program_id(1).to(tl.int64)
    row = (tile // column_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    column_tile = (tile % column_tiles).to(tl.int64)
    column = column_tile * BC + tl.arange(0, BC)
    inside = (row < M)[:, None] & (column < N)[None, :]
    if FACTORS:
        inner = tl.arange(0, BK).to(tl.int64)
        left_at = change + matrix * change_matrix + (row[:, None] * change_row + inner[None, :])
        right_at = right + matrix * right_matrix + (column[None, :] * right_row + inner[:, None])
        delta = tl.zeros((BR, BC), dtype=tl.float32)
        for start in range(0, C, BK):
            within = inner < C - start
            a = tl.load(left_at, mask=(row < M)[:, None] & within[None, :], other=0.0)
            b = tl.load(right_at, mask=(column < N)[None, :] & within[:, None], other=0.0)
            delta = tl.dot(a, b, delta, input_precision=PRECISION, out_dtype=tl.float32)
            left_at += BK
            right_at += BK
    else:
        change_at = change + matrix * change_matrix + (row[:, None] * change_row + column[None, :])
        delta = tl.load(change_at, mask=inside, other=0.0)
    stored = tl.load(
        tuned + matrix * tuned_matrix + (row[:, None] * tuned_row + column[None, :]), mask=inside, other=0.0
    )
    before = to_float64(stored, INTERP)
    step = tl.load(strength) * delta.to(tl.float64)
    exact = before + step
    nearest = _to(exact, TO, INTERP)
    found = to_float64(nearest, INTERP)
    if DRAWS:
        k0, k1 = key_of(keys + matrix * 2)
        counter = column_tile * (BC // 8) + tl.arange(0, BC // 8)
        draw = _uniform(row + first, counter, tl.cdiv(N, 8), k0, k1, BR, BC)
        above = found > exact
        low = tl.where(above, _next(nearest, TO, False), nearest)
        high = tl.where(above, nearest, _next(nearest, TO, True))
        floor = to_float64(low, INTERP)
        gap = to_float64(high, INTERP) - floor
        result = tl.where(draw * gap < exact - floor, high, low)
    else:
        kept = stored if SAME else _to(before, TO, INTERP)
        # An entry whose change is under half a unit in the last place stays as it is.
        stays = tl.abs(exact - to_float64(kept, INTERP)) <= tl.abs(exact - found)
        result = tl.where(stays, kept, nearest)
    moved = to_float64(result, INTERP) - before
    lost = moved - step
    at = sums + (matrix * tl.num_programs(0) + tile) * 4
    tl.store(at, tl.sum(tl.where(inside, step * step, 0.0)))
    tl.store(at + 1, tl.sum(tl.where(inside, lost * lost, 0.0)))
    tl.store(at + 2, tl.sum(tl.where(inside, before * before, 0.0)))
    tl.store(at + 3, tl.sum((inside & (moved != 0.0)).to(tl.float64)))
    tl.store(out + matrix * out_matrix + (row[:, None] * out_row + column[None, :]), result, mask=inside)


def add_rounded_triton(
    tuned: Tensor,
    change: Tensor,
    strength: float,
    dtype: torch.dtype,
    *,
    keys: Sequence[tuple[int, int]] | None = None,
    first: int = 0,
    out: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``tuned + strength * change`` of L matrices, see :func:`rlspec.ops.add_rounded.add_rounded`.

    Args:
        tuned: (L, m, n) float32, bfloat16 or float16 on one GPU (or on the CPU under Triton's interpreter); L at most
            65535.
        change: (L, m, n) float32.
        dtype: of the result, one of those.
        keys: of each matrix' draws; None rounds to nearest.
        first: row of the matrices that ``tuned`` begins with.
        out: (L, m, n) ``dtype`` for the result, ``tuned`` itself for instance; None makes one.
        config: sizes of tiles; columns a multiple of 8.

    Returns:
        (L, m, n) ``dtype``, and (L, 4) float64: squares of Frobenius norms of the change meant, of what rounding made
        of it, of the weight before, and the number of entries changed.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    return launch(tuned, change, None, strength, dtype, keys, first, out, None, config)


def launch(
    tuned: Tensor,
    change: Tensor,
    right: Tensor | None,
    strength: float,
    dtype: torch.dtype,
    keys: Sequence[tuple[int, int]] | None,
    first: int,
    out: Tensor | None,
    precision: Precision | None,
    config: Config | None,
) -> tuple[Tensor, Tensor]:
    """Add ``change`` (L, m, n), or with ``right`` (L, n, c) its product with ``change`` (L, m, c)."""
    _check(tuned, change, right, dtype, keys, out)
    given = [
        t if t.stride(-1) == 1 else t.contiguous()
        for t in (tuned, change, change if right is None else right)
    ]
    matrices, m, n = tuned.shape
    device = tuned.device
    family = family_of(device)
    precision = precision or NEAREST[family]
    config = config or rounding_config(family, factors=right is not None)
    if out is None:
        out = torch.empty(matrices, m, n, dtype=dtype, device=device)
    tiles = triton.cdiv(m, config.rows) * triton.cdiv(n, config.columns)
    sums = torch.empty(matrices, tiles, 4, dtype=torch.float64, device=device)
    # Python's numbers reach a kernel as float32.
    share = torch.full((1,), strength, dtype=torch.float64, device=device)
    words = torch.tensor(list(keys) if keys is not None else [(0, 0)], dtype=torch.int64).to(device)
    with torch.cuda.device(device if tuned.is_cuda else -1):
        _add_rounded_kernel[(tiles, matrices)](
            *given,
            out,
            sums,
            share,
            words,
            m,
            n,
            change.shape[-1],
            first,
            *(stride for t in (*given, out) for stride in t.stride()[:2]),
            FACTORS=right is not None,
            DRAWS=keys is not None,
            SAME=tuned.dtype == dtype,
            TO=DTYPES[dtype],
            PRECISION=precision,
            INTERP=interpreted(_add_rounded_kernel),
            BR=config.rows,
            BC=config.columns,
            BK=config.inner,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=False,  # the CPU rounds the product before it adds
        )
    return out, sums.sum(1)


def _check(
    tuned: Tensor,
    change: Tensor,
    right: Tensor | None,
    dtype: torch.dtype,
    keys: Sequence[tuple[int, int]] | None,
    out: Tensor | None,
) -> None:
    if tuned.ndim != 3 or 0 in tuned.shape:
        raise ValueError(f"expected a non-empty stack (L, m, n), found {tuple(tuned.shape)}")
    matrices, m, n = tuned.shape
    c = change.shape[-1]
    wanted = {"change": (change, (matrices, m, n))}
    if right is not None:
        wanted = {"left": (change, (matrices, m, c)), "right": (right, (matrices, n, c))}
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or c == 0 or tensor.dtype != torch.float32 or tensor.device != tuned.device:
            raise ValueError(
                f"expected {name} {shape} float32 on {tuned.device}, found {tuple(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}"
            )
    if tuned.dtype not in DTYPES or dtype not in DTYPES:
        raise ValueError(f"expected float32, bfloat16 or float16, found {tuned.dtype} and {dtype}")
    if keys is not None and len(keys) != matrices:
        raise ValueError(f"expected a key for each of {matrices} matrices, found {len(keys)}")
    if out is not None and (out.shape != tuned.shape or out.dtype != dtype or out.stride(-1) != 1):
        raise ValueError(
            f"expected out {tuple(tuned.shape)} {dtype}, rows without gaps, found {tuple(out.shape)}"
        )
