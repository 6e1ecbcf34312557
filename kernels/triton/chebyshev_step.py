"""chebyshev_step: a product and the three-term recurrence of a Chebyshev filter as its epilogue.

The product of a tile stays in registers until the tiles of the two blocks before it, and of the residual, are added with
a factor for each column: what would be four passes over blocks of the product's size is one store. A filter begins with
a sketch of ±1, which is read as bits. Each program owns one tile of the result and walks over the inner dimension alone:
no bit of the result depends on the order in which programs run.

    L: matrices   R, K: rows and columns of each   c: columns of the blocks   BR, BC, BK: their tiles
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.configs import NEAREST, RECURRENCE, Config, Precision, family_of

#: What an operand is: numbers, bits that stand for 1 and -1, or nothing.
Kind = Literal["stored", "bits", "absent"]


@triton.jit
def _spread(words, words_row, row, column, inside):
    """±1, float32, of rows and columns of a matrix whose bits, 32 rows a number, are at a pointer."""
    found = tl.load(words + ((row // 32)[:, None] * words_row + column[None, :]), mask=inside, other=0)
    bit = (found >> (row % 32).to(tl.int32)[:, None]) & 1
    return 1.0 - 2.0 * bit.to(tl.float32)


@triton.jit
def _chebyshev_step_kernel(
    matrix,  # (L, R, K) float32, rows without gaps; with TRANSPOSED its transpose (L, K, R)
    block,  # (L, K, c), likewise, or int32 bits (L, K / 32, >= c); may be current
    current,  # (L, R, c), likewise, or bits
    previous,  # (L, R, c), likewise, or bits
    residual,  # (L, R, c), likewise
    factors,  # (L, 4, c), contiguous: of the product, of current, of previous, of residual
    out,  # (L, R, c), contiguous
    R,
    K,
    C,
    matrix_matrix,  # strides in entries
    matrix_row,
    block_matrix,
    block_row,
    current_matrix,
    current_row,
    previous_matrix,
    previous_row,
    residual_matrix,
    residual_row,
    BLOCK: tl.constexpr,  # stored, bits or, but for the block, absent
    CURRENT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    column_tiles = tl.cdiv(C, BC)
    # 64 bits throughout: a stack of a model's matrices passes 2^31 entries.
    which = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BC + tl.arange(0, BC)
    inner = tl.arange(0, BK).to(tl.int64)
    matrix += which * matrix_matrix
    if TRANSPOSED:  # a tile lies as it is stored, and is turned for the product
        matrix_at = matrix + (inner[:, None] * matrix_row + row[None, :])
        matrix_step = tl.cast(matrix_row, tl.int64) * BK
    else:
        matrix_at = matrix + (row[:, None] * matrix_row + inner[None, :])
        matrix_step = BK
    block_at = block + which * block_matrix + (inner[:, None] * block_row + column[None, :])
    block_step = tl.cast(block_row, tl.int64) * BK
    sums = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, K, BK):
        within = inner < K - start
        read = within[:, None] & (row < R)[None, :] if TRANSPOSED else (row < R)[:, None] & within[None, :]
        a = tl.load(matrix_at, mask=read, other=0.0)
        if TRANSPOSED:
            a = tl.trans(a)
        read = within[:, None] & (column < C)[None, :]
        if BLOCK == "bits":  # what lies beyond K meets zeros
            x = _spread(block + which * block_matrix, block_row, start + inner, column, read)
        else:
            x = tl.load(block_at, mask=read, other=0.0)
        sums = tl.dot(a, x, sums, input_precision=PRECISION, out_dtype=tl.float32)
        matrix_at += matrix_step
        block_at += block_step
    inside = (row < R)[:, None] & (column < C)[None, :]
    factor = factors + which * 4 * C + column
    sums *= tl.load(factor, mask=column < C, other=0.0)[None, :]
    if CURRENT != "absent":
        if CURRENT == "bits":
            y = _spread(current + which * current_matrix, current_row, row, column, inside)
        else:
            y = tl.load(
                current + which * current_matrix + (row[:, None] * current_row + column[None, :]),
                mask=inside,
                other=0.0,
            )
        sums += tl.load(factor + C, mask=column < C, other=0.0)[None, :] * y
    if PREVIOUS != "absent":
        if PREVIOUS == "bits":
            y = _spread(previous + which * previous_matrix, previous_row, row, column, inside)
        else:
            y = tl.load(
                previous + which * previous_matrix + (row[:, None] * previous_row + column[None, :]),
                mask=inside,
                other=0.0,
            )
        sums += tl.load(factor + 2 * C, mask=column < C, other=0.0)[None, :] * y
    if RESIDUAL == "stored":
        y = tl.load(
            residual + which * residual_matrix + (row[:, None] * residual_row + column[None, :]),
            mask=inside,
            other=0.0,
        )
        sums += tl.load(factor + 3 * C, mask=column < C, other=0.0)[None, :] * y
    tl.store(out + which * R * C + (row[:, None] * C + column[None, :]), sums, mask=inside)


def chebyshev_step_triton(
    matrix: Tensor,
    block: Tensor,
    current: Tensor | None,
    previous: Tensor | None,
    residual: Tensor | None,
    factors: Tensor,
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """``f₀·(matrix block) + f₁·current + f₂·previous + f₃·residual`` of L matrices, a factor f for each column.

    Args:
        matrix: (L, R, K) float32, on one GPU (or on the CPU under Triton's interpreter), like all that follows, rows or
            columns without gaps (else it is copied); L at most 65535.
        block: (L, K, c). This and the next two may be bits instead, int32 as of `signs_triton`.
        current, previous, residual: (L, R, c); None leaves the term out.
        factors: (L, 4, c).
        precision: of the products, whose sums are float32: ``ieee`` or ``tf32x3``; default: what is nearest to float32
            on the device's tensor cores.
        config: sizes of tiles; default: the target's.

    Returns:
        (L, R, c) float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    operands = {"block": block, "current": current, "previous": previous, "residual": residual}
    kinds = {name: _kind(tensor) for name, tensor in operands.items()}
    _check(matrix, operands, factors)
    transposed = matrix.stride(-1) != 1 and matrix.stride(-2) == 1
    matrices, rows, inner = matrix.shape
    columns = factors.shape[-1]
    # What is not read has the matrix for its pointer.
    given = [matrix.mT if transposed else matrix]
    given += [given[0] if tensor is None else tensor for tensor in operands.values()]
    given = [t if t.stride(-1) == 1 else t.contiguous() for t in given]
    family = family_of(matrix.device)
    config = config or RECURRENCE[family]
    out = torch.empty(matrices, rows, columns, dtype=torch.float32, device=matrix.device)
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
    with torch.cuda.device(matrix.device if matrix.is_cuda else -1):
        _chebyshev_step_kernel[(tiles, matrices)](
            *given,
            factors.contiguous(),
            out,
            rows,
            inner,
            columns,
            *(stride for t in given for stride in t.stride()[:2]),
            BLOCK=kinds["block"],
            CURRENT=kinds["current"],
            PREVIOUS=kinds["previous"],
            RESIDUAL=kinds["residual"],
            TRANSPOSED=transposed,
            PRECISION=precision or NEAREST[family],
            BR=config.rows,
            BC=config.columns,
            BK=config.inner,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _kind(tensor: Tensor | None) -> Kind:
    if tensor is None:
        return "absent"
    return "bits" if tensor.dtype == torch.int32 else "stored"


def _check(matrix: Tensor, operands: dict[str, Tensor | None], factors: Tensor) -> None:
    if matrix.ndim != 3 or 0 in matrix.shape or factors.ndim != 3 or factors.shape[-1] == 0:
        raise ValueError(
            f"expected non-empty stacks (L, R, K) and (L, 4, c), found {tuple(matrix.shape)} and {tuple(factors.shape)}"
        )
    matrices, rows, inner = matrix.shape
    columns = factors.shape[-1]
    heights = {"block": inner, "factors": 4}
    for name, tensor in {"matrix": matrix, **operands, "factors": factors}.items():
        if tensor is None:
            continue
        height, dtype = heights.get(name, rows), torch.float32
        shape = (matrices, height, inner if name == "matrix" else columns)
        if name in ("block", "current", "previous") and tensor.dtype == torch.int32:
            shape, dtype = (matrices, triton.cdiv(height, 32), triton.cdiv(columns, 8) * 8), torch.int32
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != matrix.device:
            raise ValueError(
                f"expected {name} {shape} {str(dtype).removeprefix('torch.')} on {matrix.device}, found "
                f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
