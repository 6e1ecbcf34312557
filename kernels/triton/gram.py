"""gram: AᵀA of a stack of matrices, each pair of columns multiplied once.

A program owns one tile on or below the diagonal, walks over the rows of A alone and stores the tile twice, the second
time turned: half of the products, and a result that is symmetric to the bit. No atomics, so no bit depends on the order
in which programs run.

    L: matrices, (m, n) each   BR, BK: tiles of columns of A, of its rows
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.configs import GRAM, NEAREST, Config, Precision, family_of


@triton.jit
def _gram_kernel(
    a,  # (L, m, n) float32, rows without gaps
    out,  # (L, n, n) float32, contiguous
    M,
    N,
    a_matrix,  # strides in entries
    a_row,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    # Tile p of the triangle, counted row by row; the root is mended where it was rounded across a whole number.
    p = tl.program_id(0)
    i = ((tl.sqrt(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    j = p - i * (i + 1) // 2
    # 64 bits throughout: a stack of a model's matrices passes 2^31 entries.
    matrix = tl.program_id(1).to(tl.int64)
    row = i.to(tl.int64) * BR + tl.arange(0, BR)
    column = j.to(tl.int64) * BR + tl.arange(0, BR)
    inner = tl.arange(0, BK).to(tl.int64)
    a += matrix * a_matrix
    left_at = a + (inner[:, None] * a_row + row[None, :])
    right_at = a + (inner[:, None] * a_row + column[None, :])
    step = tl.cast(a_row, tl.int64) * BK
    sums = tl.zeros((BR, BR), dtype=tl.float32)
    for start in range(0, M, BK):
        within = (inner < M - start)[:, None]
        left = tl.load(left_at, mask=within & (row < N)[None, :], other=0.0)
        right = tl.load(right_at, mask=within & (column < N)[None, :], other=0.0)
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION, out_dtype=tl.float32)
        left_at += step
        right_at += step
    out += matrix * N * N
    # Row and column of the lower triangle: where the row is inside, so is the column.
    lower = (row < N)[:, None] & (row[:, None] >= column[None, :])
    tl.store(out + (row[:, None] * N + column[None, :]), sums, mask=lower)
    upper = (row < N)[None, :] & (row[None, :] > column[:, None])
    tl.store(out + (column[:, None] * N + row[None, :]), tl.trans(sums), mask=upper)


def gram_triton(a: Tensor, *, precision: Precision | None = None, config: Config | None = None) -> Tensor:
    """``aᵀ a`` of L matrices, see :func:`rlspec.ops.gram.gram`.

    Args:
        a: (L, m, n) float32, on one GPU (or on the CPU under Triton's interpreter); L at most 65535.
        precision: of the products, whose sums are float32: ``ieee`` or ``tf32x3``; default: what is nearest to float32
            on the device's tensor cores.
        config: sizes of tiles, as many rows as columns; default: the target's.

    Returns:
        (L, n, n) float32, symmetric.

    Raises:
        ValueError: not a non-empty float32 stack; tiles that are not square.
    """
    if a.ndim != 3 or 0 in a.shape or a.dtype != torch.float32:
        raise ValueError(f"expected a non-empty float32 stack (L, m, n), found {tuple(a.shape)} {a.dtype}")
    family = family_of(a.device)
    config = config or GRAM[family]
    if config.rows != config.columns:
        raise ValueError(f"expected square tiles, found {config.rows} rows and {config.columns} columns")
    a = a if a.stride(-1) == 1 else a.contiguous()
    matrices, m, n = a.shape
    out = torch.empty(matrices, n, n, dtype=torch.float32, device=a.device)
    side = triton.cdiv(n, config.rows)
    with torch.cuda.device(a.device if a.is_cuda else -1):
        _gram_kernel[(side * (side + 1) // 2, matrices)](
            a,
            out,
            m,
            n,
            *a.stride()[:2],
            PRECISION=precision or NEAREST[family],
            BR=config.rows,
            BK=config.inner,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out
