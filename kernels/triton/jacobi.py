"""jacobi: one-sided Jacobi (Hestenes) of small square matrices, each in the registers of one program.

The columns of G = A V are rotated two by two until they are orthogonal, with the tolerances and results of csrc/cuda,
whose blocks of columns are single columns here. The pairs of a round are disjoint, so every column turns at once: it
meets its partner by a gather along the tile, both work out the same rotation, and nothing is handed back. A program loops
until its matrix has converged; the host waits for nothing. No atomics, and programs do not know of each other, so no bit
depends on the order in which they run.

    b: matrices, (n, n) each, held by their columns, one after another   BN: tile of columns, and of their entries
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.configs import JACOBI_REGISTERS, Config, family_of, jacobi_config


@triton.jit
def _jacobi_kernel(
    g,  # (b, n, n) float32 or float64, rows without gaps; row i is column i of A V
    v,  # the same of V; unused without RIGHT
    values,  # (b, n) of its dtype; this and what follows contiguous
    left,  # (b, n, n)
    right,  # (b, n, n); unused without RIGHT
    status,  # (b,) int32
    sweeps,  # (b,) int32
    n,
    most_sweeps,
    g_matrix,  # strides in entries
    g_row,
    v_matrix,
    v_row,
    RIGHT: tl.constexpr,
    EPS: tl.constexpr,  # of the dtype, and its largest number
    LARGEST: tl.constexpr,
    BN: tl.constexpr,
):
    # 64 bits throughout: a stack of small matrices, too, may pass 2^31 entries.
    matrix = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BN)
    wide = column.to(tl.int64)
    inside = (column < n)[:, None] & (column < n)[None, :]
    x = tl.load(g + matrix * g_matrix + (wide[:, None] * g_row + wide[None, :]), mask=inside, other=0.0)
    y = x
    if RIGHT:
        y = tl.load(v + matrix * v_matrix + (wide[:, None] * v_row + wide[None, :]), mask=inside, other=0.0)
    squares = tl.sum(x * x, axis=1)
    finite = tl.sum((squares <= LARGEST).to(tl.int32), axis=0) == BN  # false for NaN
    # The cosine of two computed columns is not known better than this; a column no longer than `least` is rounding.
    tolerance = _root(tl.cast(n, x.dtype)) * EPS
    least = _root(tl.max(squares, axis=0)) * tolerance
    # A tournament of an even number of players; where n is odd, a column of zeros plays along.
    others = (n + 1) // 2 * 2 - 1
    state = tl.where(finite, 1, 2)
    done = tl.cast(0, tl.int32)
    while (state == 1) & (done < most_sweeps):
        off = tl.zeros((), dtype=x.dtype)
        for turn in range(others):
            partner = 2 * turn % others - column
            partner = tl.where(partner < 0, partner + others, partner)
            partner = tl.where(partner == column, others, partner)
            partner = tl.where(column == others, turn, partner)
            partner = tl.where(column > others, column, partner)  # padding: zeros stay zeros
            index = tl.broadcast_to(partner[:, None], (BN, BN))
            other = tl.gather(x, index, 0)
            product = tl.sum(x * other, axis=1)
            mine = tl.sum(x * x, axis=1)
            theirs = tl.gather(mine, partner, 0)  # to the bit what the partner has
            lengths = _root(mine) * _root(theirs)
            known = tl.minimum(_root(mine), _root(theirs)) > least
            cosines = tl.where(known, _over(tl.abs(product), tl.where(known, lengths, 1.0)), 0.0)
            off = tl.maximum(off, tl.max(cosines, axis=0))
            # Of the two angles the smaller. The partner finds its negative: of equal lengths, where both would turn the
            # same way, the second turns back.
            turns = tl.abs(product) > tolerance * lengths
            zeta = _over(theirs - mine, tl.where(turns, 2 * product, 1.0))
            back = (zeta < 0) | ((zeta == 0) & (column > partner))
            tangent = _over(tl.where(back, -1.0, 1.0).to(x.dtype), tl.abs(zeta) + _root(1 + zeta * zeta))
            cosine = _over(tl.full((BN,), 1.0, x.dtype), _root(1 + tangent * tangent))
            sine = tl.where(turns, cosine * tangent, 0.0)[:, None]
            # `cosine x - sine other` as a change, as small as the angle: so is its rounding, and hundreds of rotations
            # leave V orthogonal.
            half = _over(sine, (1 + cosine)[:, None])
            x = x - sine * (other + half * x)
            if RIGHT:
                y = y - sine * (tl.gather(y, index, 0) + half * y)
        done += 1
        state = tl.where(off <= tolerance, 0, 1)
    norms = _root(tl.sum(x * x, axis=1))
    # Rows of padding come after those of the matrix that are zero, too.
    longer = (norms[None, :] > norms[:, None]) | (
        (norms[None, :] == norms[:, None]) & (column[None, :] < column[:, None])
    )
    place = tl.where(state < 2, tl.sum(longer.to(tl.int32), axis=1), column).to(tl.int64)
    known = (state < 2) & (norms > least)
    x = tl.where(known[:, None], _over(x, tl.where(known, norms, 1.0)[:, None]), 0.0)
    there = column < n
    if (state == 0) & (tl.sum((there & (norms <= least)).to(tl.int32), axis=0) > 0):
        # Left vectors of values that are rounding, which A does not determine: any that make U orthogonal. Each is the
        # unit vector that the others hold least of, orthogonalised twice.
        for k in range(n):
            if tl.sum(((column == k) & known).to(tl.int32), axis=0) == 0:
                held = tl.where(there, tl.sum(x * x, axis=0), 2.0)
                fresh = tl.where(column == tl.argmin(held, axis=0), 1.0, 0.0).to(x.dtype)
                for _ in range(2):
                    fresh -= tl.sum(tl.sum(x * fresh[None, :], axis=1)[:, None] * x, axis=0)
                fresh = _over(fresh, _root(tl.sum(fresh * fresh, axis=0)))
                x = tl.where((column == k)[:, None], fresh[None, :], x)
    size = tl.cast(n, tl.int64)
    to = matrix * size * size + (place[:, None] * size + wide[None, :])
    tl.store(values + matrix * size + place, norms, mask=there)
    tl.store(left + to, x, mask=inside)
    if RIGHT:
        tl.store(right + to, y, mask=inside)
    tl.store(status + matrix, state)
    tl.store(sweeps + matrix, done)


@triton.jit
def _root(x):
    """To the nearest, as the plain one of float64 is."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _over(a, b):
    """To the nearest, as the plain one of float64 is."""
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


def jacobi_triton(
    g: Tensor, v: Tensor | None = None, *, most_sweeps: int, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Values, left and right vectors, status and sweeps, see :class:`rlspec.linalg.jacobi.Rotates`.

    Args:
        g: (b, n, n) float32 or float64, on one GPU (or on the CPU under Triton's interpreter); n at most 64.
        v: (b, n, n) of its dtype, or None.
        most_sweeps: after these it gives up.
        config: size of the tile, n at least, as many rows as columns; default: the smallest that holds the matrix.

    Returns:
        (b, n), (b, n, n), the same or None, all of the dtype of ``g``; (b,) and (b,) int32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or a tile that does not fit the matrix.
    """
    _check(g, v)
    matrices, n, _ = g.shape
    config = config or jacobi_config(n, g.dtype)
    if config.rows != config.columns or config.rows < n:
        raise ValueError(f"expected a square tile of at least {n}, found {config.rows} x {config.columns}")
    given = [t if t.stride(-1) == 1 else t.contiguous() for t in (g, g if v is None else v)]
    values = torch.empty(matrices, n, dtype=g.dtype, device=g.device)
    left = torch.empty(matrices, n, n, dtype=g.dtype, device=g.device)
    right = None if v is None else torch.empty(matrices, n, n, dtype=g.dtype, device=g.device)
    status, sweeps = (torch.empty(matrices, dtype=torch.int32, device=g.device) for _ in range(2))
    numbers = torch.finfo(g.dtype)
    limit = {"maxnreg": JACOBI_REGISTERS} if family_of(g.device).startswith("sm_") else {}  # AMD's knows none
    with torch.cuda.device(g.device if g.is_cuda else -1):
        _jacobi_kernel[(matrices,)](
            *given,
            values,
            left,
            left if right is None else right,
            status,
            sweeps,
            n,
            most_sweeps,
            *(stride for t in given for stride in t.stride()[:2]),
            RIGHT=v is not None,
            EPS=numbers.eps,
            LARGEST=numbers.max,
            BN=config.rows,
            num_warps=config.warps,
            num_stages=config.stages,
            **limit,
        )
    return values, left, right, status, sweeps


def _check(g: Tensor, v: Tensor | None) -> None:
    if g.ndim != 3 or 0 in g.shape or g.shape[-1] != g.shape[-2]:
        raise ValueError(f"expected a non-empty stack (b, n, n), found {tuple(g.shape)}")
    if g.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 or float64, found {g.dtype}")
    if v is not None and (v.shape, v.dtype, v.device) != (g.shape, g.dtype, g.device):
        raise ValueError(
            f"expected V {tuple(g.shape)} {g.dtype} on {g.device}, found {tuple(v.shape)} {v.dtype} on {v.device}"
        )
