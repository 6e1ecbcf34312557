"""residual_norms: lengths of the columns of A X - Y diag(s), the difference formed in registers and never stored.

Each program owns one tile of the difference, walks over the inner dimension alone and writes the squares of its columns,
summed in float64; those of a column are added up in the order of its tiles. No atomics: no bit depends on the order in
which programs run.

    L: matrices   R, K: rows and columns of each   c: columns of the blocks   T: tiles of rows
    BR, BC, BK: tiles
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.configs import NEAREST, RECURRENCE, Config, Precision, family_of


@triton.jit
def _residual_norms_kernel(
    matrix,  # A (L, R, K) float32, rows without gaps; with TRANSPOSED its transpose (L, K, R)
    x,  # (L, K, c), likewise
    y,  # (L, R, c), likewise
    s,  # (L, c), contiguous
    squares,  # (L, T, c) float64, contiguous
    R,
    K,
    C,
    matrix_matrix,  # strides in entries
    matrix_row,
    x_matrix,
    x_row,
    y_matrix,
    y_row,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    column_tiles = tl.cdiv(C, BC)
    # 64 bits throughout: a stack of a model's matrices passes 2^31 entries.
    which = tl.program_id(1).to(tl.int64)
    row_tile = (tl.program_id(0) // column_tiles).to(tl.int64)
    row = row_tile * BR + tl.arange(0, BR)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BC + tl.arange(0, BC)
    inner = tl.arange(0, BK).to(tl.int64)
    matrix += which * matrix_matrix
    if TRANSPOSED:  # a tile lies as it is stored, and is turned for the product
        matrix_at = matrix + (inner[:, None] * matrix_row + row[None, :])
        matrix_step = tl.cast(matrix_row, tl.int64) * BK
    else:
        matrix_at = matrix + (row[:, None] * matrix_row + inner[None, :])
        matrix_step = BK
    x_at = x + which * x_matrix + (inner[:, None] * x_row + column[None, :])
    x_step = tl.cast(x_row, tl.int64) * BK
    sums = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, K, BK):
        left = inner < K - start
        within = left[:, None] & (row < R)[None, :] if TRANSPOSED else (row < R)[:, None] & left[None, :]
        a = tl.load(matrix_at, mask=within, other=0.0)
        b = tl.load(x_at, mask=left[:, None] & (column < C)[None, :], other=0.0)
        if TRANSPOSED:
            a = tl.trans(a)
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=tl.float32)
        matrix_at += matrix_step
        x_at += x_step
    y_at = y + which * y_matrix + (row[:, None] * y_row + column[None, :])
    image = tl.load(y_at, mask=(row < R)[:, None] & (column < C)[None, :], other=0.0)
    value = tl.load(s + which * C + column, mask=column < C, other=0.0)
    # Rows and columns outside are zeros.
    difference = (sums - image * value[None, :]).to(tl.float64)
    squares += (which * tl.cdiv(R, BR) + row_tile) * C
    tl.store(squares + column, tl.sum(difference * difference, axis=0), mask=column < C)


def residual_norms_triton(
    a: Tensor,
    x: Tensor,
    y: Tensor,
    s: Tensor,
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> Tensor:
    """Lengths of the columns of ``a x - y diag(s)`` of L matrices.

    Args:
        a: (L, R, K) float32, on one GPU (or on the CPU under Triton's interpreter), like all that follows, rows or
            columns without gaps (else it is copied); L at most 65535.
        x: (L, K, c).
        y: (L, R, c).
        s: (L, c).
        precision: of the products, whose sums are float32: ``ieee`` or ``tf32x3``; default: what is nearest to float32
            on the device's tensor cores.
        config: sizes of tiles; default: the target's.

    Returns:
        (L, c) float64.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check(a, x, y, s)
    transposed = a.stride(-1) != 1 and a.stride(-2) == 1
    given = [t if t.stride(-1) == 1 else t.contiguous() for t in (a.mT if transposed else a, x, y)]
    matrices, rows, inner = a.shape
    columns = x.shape[-1]
    family = family_of(a.device)
    config = config or RECURRENCE[family]
    row_tiles = triton.cdiv(rows, config.rows)
    squares = torch.empty(matrices, row_tiles, columns, dtype=torch.float64, device=a.device)
    with torch.cuda.device(a.device if a.is_cuda else -1):
        _residual_norms_kernel[(row_tiles * triton.cdiv(columns, config.columns), matrices)](
            *given,
            s.contiguous(),
            squares,
            rows,
            inner,
            columns,
            *(stride for t in given for stride in t.stride()[:2]),
            TRANSPOSED=transposed,
            PRECISION=precision or NEAREST[family],
            BR=config.rows,
            BC=config.columns,
            BK=config.inner,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return squares.sum(1).sqrt()


def _check(a: Tensor, x: Tensor, y: Tensor, s: Tensor) -> None:
    if a.ndim != 3 or 0 in a.shape or x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(
            f"expected non-empty stacks (L, R, K) and (L, K, c), found {tuple(a.shape)} and {tuple(x.shape)}"
        )
    matrices, rows, inner = a.shape
    columns = x.shape[-1]
    wanted = {
        "a": (a, (matrices, rows, inner)),
        "x": (x, (matrices, inner, columns)),
        "y": (y, (matrices, rows, columns)),
        "s": (s, (matrices, columns)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device != a.device:
            raise ValueError(
                f"expected {name} {shape} float32 on {a.device}, found {tuple(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}"
            )
