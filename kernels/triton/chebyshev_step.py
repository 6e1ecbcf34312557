"""chebyshev_step: a product and the three-term recurrence of a Chebyshev filter as its epilogue.

The product of a tile stays in registers until the tiles of the two blocks before it, and of the residual, are added with
a factor for each column: what would be four passes over blocks of the product's size is one store. Each program owns one
tile of the result and walks over the inner dimension alone: no bit depends on the order in which programs run.

    L: matrices   R, K: rows and columns of each   c: columns of the blocks   BR, BC, BK: their tiles
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.configs import NEAREST, RECURRENCE, Config, Precision, family_of


@triton.jit
def _chebyshev_step_kernel(
    matrix,  # (L, R, K) float32, rows without gaps
    block,  # (L, K, c), likewise; may be current
    current,  # (L, R, c), likewise
    previous,  # (L, R, c), likewise
    residual,  # (L, R, c), likewise; unused without RESIDUAL
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
    RESIDUAL: tl.constexpr,
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
    matrix_at = matrix + which * matrix_matrix + (row[:, None] * matrix_row + inner[None, :])
    block_at = block + which * block_matrix + (inner[:, None] * block_row + column[None, :])
    block_step = tl.cast(block_row, tl.int64) * BK
    sums = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, K, BK):
        within = inner < K - start
        a = tl.load(matrix_at, mask=(row < R)[:, None] & within[None, :], other=0.0)
        x = tl.load(block_at, mask=within[:, None] & (column < C)[None, :], other=0.0)
        sums = tl.dot(a, x, sums, input_precision=PRECISION, out_dtype=tl.float32)
        matrix_at += BK
        block_at += block_step
    inside = (row < R)[:, None] & (column < C)[None, :]
    factor = factors + which * 4 * C + column
    sums *= tl.load(factor, mask=column < C, other=0.0)[None, :]
    y = tl.load(
        current + which * current_matrix + (row[:, None] * current_row + column[None, :]),
        mask=inside,
        other=0.0,
    )
    sums += tl.load(factor + C, mask=column < C, other=0.0)[None, :] * y
    y = tl.load(
        previous + which * previous_matrix + (row[:, None] * previous_row + column[None, :]),
        mask=inside,
        other=0.0,
    )
    sums += tl.load(factor + 2 * C, mask=column < C, other=0.0)[None, :] * y
    if RESIDUAL:
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
    current: Tensor,
    previous: Tensor,
    residual: Tensor | None,
    factors: Tensor,
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """``f₀·(matrix block) + f₁·current + f₂·previous + f₃·residual`` of L matrices, a factor f for each column.

    Args:
        matrix: (L, R, K) float32, on one GPU (or on the CPU under Triton's interpreter), like all that follows; L at
            most 65535.
        block: (L, K, c).
        current, previous, residual: (L, R, c).
        factors: (L, 4, c).
        precision: of the products, whose sums are float32: ``ieee`` or ``tf32x3``; default: what is nearest to float32
            on the device's tensor cores.
        config: sizes of tiles; default: the target's.

    Returns:
        (L, R, c) float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check(matrix, block, current, previous, residual, factors)
    given = [
        t if t.stride(-1) == 1 else t.contiguous()
        for t in (matrix, block, current, previous, current if residual is None else residual)
    ]
    matrices, rows, inner = matrix.shape
    columns = block.shape[-1]
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
            RESIDUAL=residual is not None,
            PRECISION=precision or NEAREST[family],
            BR=config.rows,
            BC=config.columns,
            BK=config.inner,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _check(
    matrix: Tensor,
    block: Tensor,
    current: Tensor,
    previous: Tensor,
    residual: Tensor | None,
    factors: Tensor,
) -> None:
    if matrix.ndim != 3 or 0 in matrix.shape or block.ndim != 3 or block.shape[-1] == 0:
        raise ValueError(
            f"expected non-empty stacks (L, R, K) and (L, K, c), found {tuple(matrix.shape)} and {tuple(block.shape)}"
        )
    matrices, rows, inner = matrix.shape
    columns = block.shape[-1]
    wanted = {
        "matrix": (matrix, (matrices, rows, inner)),
        "block": (block, (matrices, inner, columns)),
        "current": (current, (matrices, rows, columns)),
        "previous": (previous, (matrices, rows, columns)),
        "residual": (current if residual is None else residual, (matrices, rows, columns)),
        "factors": (factors, (matrices, 4, columns)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device != matrix.device:
            raise ValueError(
                f"expected {name} {shape} float32 on {matrix.device}, found {tuple(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}"
            )
