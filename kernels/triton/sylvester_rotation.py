"""sylvester_rotation: an elementwise solve of two equations, alone or as the epilogue of the two products it follows.

With products a program owns one tile of both, U2ᵀ A and V2ᵀ B, walks over their inner dimensions one after the other and
keeps the sums in registers: what would be some twenty passes over blocks of the products' size are four stores. No
atomics, so no bit depends on the order in which programs run.

    L: matrices, (m, n) each   r: columns of their factors   w: columns of the blocks   p = r - w
    BR, BC, BK: tiles of the p rows, of the w columns, of m and n
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.configs import NEAREST, ROTATION, Config, Precision, family_of


@triton.jit
def _sylvester_rotation_kernel(
    tail,  # s2 (L, p) float64, without gaps
    leading,  # s1 (L, w) float64, likewise
    left,  # (L, p, w) float32, rows without gaps; with PRODUCTS U2ᵀ A goes there
    right,  # (L, p, w), likewise; with PRODUCTS V2ᵀ B
    to_right,  # P (L, p, w), contiguous
    to_left,  # Q (L, p, w), contiguous
    u,  # U2 (L, m, p) float32, rows without gaps; this and the next three unused without PRODUCTS
    a,  # A (L, m, w), likewise
    vh,  # V2ᵀ (L, p, n), likewise
    b,  # B (L, n, w), likewise
    floor,
    R,
    C,
    M,
    N,
    tail_matrix,  # strides in entries
    leading_matrix,
    left_matrix,
    left_row,
    right_matrix,
    right_row,
    u_matrix,
    u_row,
    a_matrix,
    a_row,
    vh_matrix,
    vh_row,
    b_matrix,
    b_row,
    PRODUCTS: tl.constexpr,
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
    inside = (row < R)[:, None] & (column < C)[None, :]
    left_at = left + which * left_matrix + (row[:, None] * left_row + column[None, :])
    right_at = right + which * right_matrix + (row[:, None] * right_row + column[None, :])
    if PRODUCTS:
        inner = tl.arange(0, BK).to(tl.int64)
        u_at = u + which * u_matrix + (inner[:, None] * u_row + row[None, :])
        a_at = a + which * a_matrix + (inner[:, None] * a_row + column[None, :])
        x = tl.zeros((BR, BC), dtype=tl.float32)
        for start in range(0, M, BK):
            within = (inner < M - start)[:, None]
            factor = tl.load(u_at, mask=within & (row < R)[None, :], other=0.0)
            block = tl.load(a_at, mask=within & (column < C)[None, :], other=0.0)
            x = tl.dot(tl.trans(factor), block, x, input_precision=PRECISION, out_dtype=tl.float32)
            u_at += tl.cast(u_row, tl.int64) * BK
            a_at += tl.cast(a_row, tl.int64) * BK
        tl.store(left_at, x, mask=inside)
        vh_at = vh + which * vh_matrix + (row[:, None] * vh_row + inner[None, :])
        b_at = b + which * b_matrix + (inner[:, None] * b_row + column[None, :])
        y = tl.zeros((BR, BC), dtype=tl.float32)
        for start in range(0, N, BK):
            left_over = inner < N - start
            factor = tl.load(vh_at, mask=(row < R)[:, None] & left_over[None, :], other=0.0)
            block = tl.load(b_at, mask=left_over[:, None] & (column < C)[None, :], other=0.0)
            y = tl.dot(factor, block, y, input_precision=PRECISION, out_dtype=tl.float32)
            vh_at += BK
            b_at += tl.cast(b_row, tl.int64) * BK
        tl.store(right_at, y, mask=inside)
    else:
        x = tl.load(left_at, mask=inside, other=0.0)
        y = tl.load(right_at, mask=inside, other=0.0)
    s2 = tl.load(tail + which * tail_matrix + row, mask=row < R, other=0.0).to(tl.float32)[:, None]
    s1 = tl.load(leading + which * leading_matrix + column, mask=column < C, other=1.0).to(tl.float32)[
        None, :
    ]
    denominator = tl.maximum((s1 - s2) * (s1 + s2), floor * (s1 * s1))
    at = which * R * C + (row[:, None] * C + column[None, :])
    tl.store(to_right + at, (s2 * x + s1 * y) / denominator, mask=inside)
    tl.store(to_left + at, (s1 * x + s2 * y) / denominator, mask=inside)


def sylvester_rotation_triton(
    tail: Tensor, leading: Tensor, left: Tensor, right: Tensor, floor: float, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """P and Q, see :func:`rlspec.ops.sylvester_rotation.sylvester_rotation`.

    Args:
        tail: (L, p) float64, on one GPU (or on the CPU under Triton's interpreter), like all that follows; L at most
            65535.
        leading: (L, w) float64.
        left, right: (L, p, w) float32.
        floor: of the denominators, as a share of the leading value's square.
        config: sizes of tiles; default: the target's.

    Returns:
        (L, p, w) float32 each.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    if left.ndim != 3 or 0 in left.shape:
        raise ValueError(f"expected a non-empty stack (L, p, w), found {tuple(left.shape)}")
    matrices, rows, columns = left.shape
    shape = (matrices, rows, columns)
    _check(left.device, tail=(tail, (matrices, rows)), leading=(leading, (matrices, columns)))
    _check(left.device, left=(left, shape), right=(right, shape))
    left, right = (t if t.stride(-1) == 1 else t.contiguous() for t in (left, right))
    return _launch(tail, leading, left, right, None, floor, None, config)


def rotation_of_images_triton(
    u: Tensor,
    vh: Tensor,
    values: Tensor,
    a: Tensor,
    b: Tensor,
    floor: float,
    *,
    precision: Precision | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Couplings and rotation, see :func:`rlspec.ops.sylvester_rotation.rotation_of_images`.

    Args:
        u: (L, m, r) float32, on one GPU (or on the CPU under Triton's interpreter), like all that follows; L at most
            65535.
        vh: (L, r, n) float32.
        values: (L, r) float64.
        a: (L, m, w) float32, w < r.
        b: (L, n, w) float32.
        floor: of the denominators, as a share of the leading value's square.
        precision: of the products, whose sums are float32: ``ieee`` or ``tf32x3``; default: what is nearest to float32
            on the device's tensor cores.
        config: sizes of tiles; default: the target's.

    Returns:
        uᵀ a (L, r, w), V2ᵀ b, P and Q (L, r - w, w), float32. The first w rows of uᵀ a are torch's product.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    if u.ndim != 3 or 0 in u.shape or a.ndim != 3 or not 0 < a.shape[-1] < u.shape[-1]:
        raise ValueError(
            f"expected stacks (L, m, r) and (L, m, w) with 0 < w < r, found {tuple(u.shape)} and {tuple(a.shape)}"
        )
    (matrices, m, r), w, n = u.shape, a.shape[-1], vh.shape[-1]
    _check(u.device, u=(u, (matrices, m, r)), vh=(vh, (matrices, r, n)), values=(values, (matrices, r)))
    _check(u.device, a=(a, (matrices, m, w)), b=(b, (matrices, n, w)))
    couplings = torch.empty(matrices, r, w, dtype=torch.float32, device=u.device)
    others = torch.empty(matrices, r - w, w, dtype=torch.float32, device=u.device)
    torch.matmul(u[..., :w].mT, a, out=couplings[:, :w])
    given = [u[..., w:], a, vh[:, w:], b]
    given = [t if t.stride(-1) == 1 else t.contiguous() for t in given]
    turns = _launch(values[:, w:], values[:, :w], couplings[:, w:], others, given, floor, precision, config)
    return couplings, others, *turns


def _launch(
    tail: Tensor,
    leading: Tensor,
    left: Tensor,
    right: Tensor,
    factors: list[Tensor] | None,
    floor: float,
    precision: Precision | None,
    config: Config | None,
) -> tuple[Tensor, Tensor]:
    """Read ``left`` and ``right``, or with ``factors`` (U2, A, V2ᵀ, B) write their products there."""
    matrices, rows, columns = left.shape
    tail, leading = (t if t.stride(-1) == 1 else t.contiguous() for t in (tail, leading))
    family = family_of(left.device)
    config = config or ROTATION[family]
    multiplied = [left] * 4 if factors is None else factors
    to_right, to_left = (
        torch.empty(matrices, rows, columns, dtype=torch.float32, device=left.device) for _ in range(2)
    )
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
    with torch.cuda.device(left.device if left.is_cuda else -1):
        _sylvester_rotation_kernel[(tiles, matrices)](
            tail,
            leading,
            left,
            right,
            to_right,
            to_left,
            *multiplied,
            floor,
            rows,
            columns,
            multiplied[0].shape[-2],
            multiplied[3].shape[-2],
            tail.stride(0),
            leading.stride(0),
            *(stride for t in (left, right, *multiplied) for stride in t.stride()[:2]),
            PRODUCTS=factors is not None,
            PRECISION=precision or NEAREST[family],
            BR=config.rows,
            BC=config.columns,
            BK=config.inner,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return to_right, to_left


def _check(device: torch.device, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in tensors.items():
        dtype = torch.float64 if name in ("tail", "leading", "values") else torch.float32
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"expected {name} {shape} {dtype} on {device}, found {tuple(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}"
            )
