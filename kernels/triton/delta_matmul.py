"""delta_matmul: (W - W_ref) X and (W - W_ref)ᵀ Y of a stack of matrices, E formed in registers and never stored.

Tiles of W and W_ref are loaded, subtracted in float32, where the difference of two bfloat16 numbers is exact, and
multiplied at once. Each program owns one tile of the result and walks over the inner dimension alone: no atomics, so no
bit depends on the order in which programs run. Programs that share rows of W are neighbours, and find them in cache.

    L: matrices, (m, n) each   c: columns of the block
    R: rows of the result, m or n   K: inner dimension, n or m
    BR, BC, BK: their tiles
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.common import DTYPES, interpreted, to_bfloat16
from rlspec.kernels.configs import NEAREST, Config, Precision, family_of, product_config


@triton.jit
def _delta_matmul_kernel(
    tuned,  # W (L, m, n), rows without gaps
    base,  # W_ref, likewise
    block,  # X (L, K, c) float32, likewise
    out,  # (L, R, c) float32, contiguous
    R,
    K,
    C,
    tuned_matrix,  # strides in entries
    tuned_row,
    base_matrix,
    base_row,
    block_matrix,
    block_row,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,  # ieee, tf32x3 or bf16
    INTERP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    column_tiles = tl.cdiv(C, BC)
    # 64 bits throughout: a stack of a model's matrices passes 2^31 entries.
    matrix = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BC + tl.arange(0, BC)
    inner = tl.arange(0, BK).to(tl.int64)
    tuned += matrix * tuned_matrix
    base += matrix * base_matrix
    block += matrix * block_matrix
    if TRANSPOSED:  # a tile of W lies as it is stored, and is turned for the product
        tuned_at = tuned + (inner[:, None] * tuned_row + row[None, :])
        base_at = base + (inner[:, None] * base_row + row[None, :])
        tuned_step = tl.cast(tuned_row, tl.int64) * BK
        base_step = tl.cast(base_row, tl.int64) * BK
    else:
        tuned_at = tuned + (row[:, None] * tuned_row + inner[None, :])
        base_at = base + (row[:, None] * base_row + inner[None, :])
        tuned_step = BK
        base_step = BK
    block_at = block + (inner[:, None] * block_row + column[None, :])
    block_step = tl.cast(block_row, tl.int64) * BK
    sums = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, K, BK):
        left = inner < K - start
        inside = left[:, None] & (row < R)[None, :] if TRANSPOSED else (row < R)[:, None] & left[None, :]
        w = tl.load(tuned_at, mask=inside, other=0.0).to(tl.float32)
        w_ref = tl.load(base_at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(block_at, mask=left[:, None] & (column < C)[None, :], other=0.0)
        e = w - w_ref
        if TRANSPOSED:
            e = tl.trans(e)
        if PRECISION == "bf16":
            e = to_bfloat16(e, INTERP)
            x = to_bfloat16(x, INTERP)
            if (
                INTERP
            ):  # products of two bfloat16 numbers are exact in float32, which is what tensor cores add up
                e = e.to(tl.float32)
                x = x.to(tl.float32)
            sums = tl.dot(e, x, sums, out_dtype=tl.float32)
        else:
            sums = tl.dot(e, x, sums, input_precision=PRECISION, out_dtype=tl.float32)
        tuned_at += tuned_step
        base_at += base_step
        block_at += block_step
    out_at = out + matrix * R * C + (row[:, None] * C + column[None, :])
    tl.store(out_at, sums, mask=(row < R)[:, None] & (column < C)[None, :])


def delta_matmul_triton(
    tuned: Tensor,
    base: Tensor,
    x: Tensor,
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """``(W - W_ref) x`` of L matrices, see :func:`rlspec.ops.delta_matmul.delta_matmul`.

    Args:
        tuned, base: W and W_ref, (L, m, n) float32, bfloat16 or float16, on one GPU (or on the CPU under Triton's
            interpreter); L at most 65535.
        x: (L, n, c) float32.
        precision: of the products, whose sums are float32 in any case. ``ieee``, ``tf32x3`` (three products of split
            factors on NVIDIA's tensor cores) or ``bf16`` (both factors rounded once: an error of 2^-9 of E, not of W);
            default: what is nearest to float32 on the device's tensor cores.
        config: sizes of tiles; default: the target's.

    Returns:
        (L, m, c) float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    return _product(tuned, base, x, False, precision, config)


def delta_rmatmul_triton(
    tuned: Tensor,
    base: Tensor,
    y: Tensor,
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """``(W - W_ref)ᵀ y`` for y (L, m, c), shape (L, n, c); otherwise as :func:`delta_matmul_triton`."""
    return _product(tuned, base, y, True, precision, config)


def _product(
    tuned: Tensor,
    base: Tensor,
    block: Tensor,
    transposed: bool,
    precision: Precision | None,
    config: Config | None,
) -> Tensor:
    _check(tuned, base, block, transposed)
    tuned, base, block = (t if t.stride(-1) == 1 else t.contiguous() for t in (tuned, base, block))
    matrices, m, n = tuned.shape
    rows, inner, columns = (n, m, block.shape[-1]) if transposed else (m, n, block.shape[-1])
    family = family_of(tuned.device)
    precision = precision or NEAREST[family]
    config = config or product_config(family, precision, columns)
    out = torch.empty(matrices, rows, columns, dtype=torch.float32, device=tuned.device)
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
    with torch.cuda.device(tuned.device if tuned.is_cuda else -1):
        _delta_matmul_kernel[(tiles, matrices)](
            tuned,
            base,
            block,
            out,
            rows,
            inner,
            columns,
            *(stride for t in (tuned, base, block) for stride in t.stride()[:2]),
            TRANSPOSED=transposed,
            PRECISION=precision,
            INTERP=interpreted(_delta_matmul_kernel),
            BR=config.rows,
            BC=config.columns,
            BK=config.inner,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _check(tuned: Tensor, base: Tensor, block: Tensor, transposed: bool) -> None:
    if tuned.ndim != 3 or tuned.shape != base.shape or 0 in tuned.shape:
        raise ValueError(
            f"expected two equal, non-empty stacks (L, m, n), found {tuned.shape} and {base.shape}"
        )
    wanted = tuned.shape[0], tuned.shape[1] if transposed else tuned.shape[2]
    if block.ndim != 3 or block.shape[:2] != wanted or block.shape[-1] == 0:
        raise ValueError(f"expected a block {(*wanted, 'c')} for matrices {tuned.shape}, found {block.shape}")
    if tuned.dtype not in DTYPES or base.dtype not in DTYPES or block.dtype != torch.float32:
        raise ValueError(
            f"expected float32, bfloat16 or float16 matrices and a float32 block, found {tuned.dtype}, "
            f"{base.dtype} and {block.dtype}"
        )
    if base.device != tuned.device or block.device != tuned.device:
        raise ValueError("expected the matrices and the block on one device")
