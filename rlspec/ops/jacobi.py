"""Singular value decompositions of small square matrices by one-sided Jacobi (Hestenes), many at once.

The columns of G = A V are rotated two by two until they are orthogonal: then G = U S, and A = U S Vᵀ. In a round of a
sweep the pairs are disjoint, and all of them turn at once: the tournament of Brent and Luk (SIAM J. Sci. Stat. Comput. 6,
1985), in which everybody meets everybody once.

For a symmetric A with all eigenvalues above zero U and V are the same, so V need not be kept: a symmetric matrix is
shifted there by whoever calls. A start, an orthogonal basis near V, is a first product, and by whoever calls, too.

Axes: ``b`` matrices of a batch, ``n`` rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlspec.errors import TensorError
from rlspec.ops.table import choose

#: Sweeps after which it gives up: hard matrices take half as many.
MOST_SWEEPS = 30
CONVERGED, RUNNING, NOT_FINITE = 0, 1, 2


class Rotated(NamedTuple):
    """What one-sided Jacobi made of ``G = A V`` whose columns were the rows of ``g``."""

    values: Tensor  #: (b, n), descending, not negative
    left: Tensor  #: (b, n, n); row i is left vector i
    right: Tensor | None  #: the same of V, where that was given
    status: Tensor  #: (b,) int32: 0 converged, 1 the sweeps were not enough, 2 not finite
    sweeps: Tensor  #: (b,) int32; the last one only looked


def jacobi(g: Tensor, v: Tensor | None = None, *, most_sweeps: int = MOST_SWEEPS) -> Rotated:
    """Rotate columns until they are orthogonal; each matrix for itself, whatever its neighbours.

    By the kernel the host waits for nothing. In plain torch on a device it waits for every sweep.

    Args:
        g: (b, n, n) float64 or float32; row i is column i of A V. Its squares must not overflow.
        v: (b, n, n) of its dtype; row i is column i of the orthogonal V, or None where V is not wanted.
        most_sweeps: see `MOST_SWEEPS`.

    Raises:
        TensorError: not a stack of square matrices, or a V that does not fit.
    """
    if g.ndim != 3 or g.shape[-1] != g.shape[-2] or g.dtype not in (torch.float32, torch.float64):
        raise TensorError(
            f"expected a float32 or float64 stack (b, n, n), found {tuple(g.shape)} in {g.dtype}"
        )
    if v is not None and (v.shape != g.shape or v.dtype != g.dtype):
        raise TensorError(
            f"expected a V of shape {tuple(g.shape)} in {g.dtype}, found {tuple(v.shape)} in {v.dtype}"
        )
    if choose("jacobi", g.device, (g.dtype,), g.shape) == "triton":
        from rlspec.kernels.jacobi import jacobi_triton

        return Rotated(*jacobi_triton(g, v, most_sweeps=most_sweeps))
    return _in_rounds(g, v, most_sweeps)


def _in_rounds(g: Tensor, v: Tensor | None, most_sweeps: int) -> Rotated:
    b, n, _ = g.shape
    squares = g.square().sum(-1)
    finite = (squares <= torch.finfo(g.dtype).max).all(-1)
    tolerance = n**0.5 * torch.finfo(g.dtype).eps
    least = squares.sqrt().amax(-1, keepdim=True) * tolerance if n else squares.new_zeros(b, 1)
    x = torch.cat([g, g.new_zeros(b, n % 2, n)], dim=1)  # an even number of players
    y = None if v is None else torch.cat([v, v.new_zeros(b, n % 2, n)], dim=1)
    partners = [torch.tensor(p, device=g.device) for p in tournament(x.shape[1])]
    status = torch.where(finite, RUNNING, NOT_FINITE).to(torch.int32)
    sweeps = torch.zeros_like(status)
    for _ in range(most_sweeps):
        running = status == RUNNING
        if not bool(running.any()):
            break
        off = squares.new_zeros(b)
        for partner in partners:
            other = x[:, partner]
            sine, half, cosines = _rotation(x, other, partner, tolerance, least)
            off = torch.maximum(off, cosines.amax(-1))
            sine = torch.where(running[:, None], sine, 0.0)[..., None]
            x = x - sine * (other + half[..., None] * x)
            if y is not None:
                y = y - sine * (y[:, partner] + half[..., None] * y)
        sweeps += running
        status = torch.where(running & (off <= tolerance), CONVERGED, status)
    x = x[:, :n]
    norms, order = x.norm(dim=-1).sort(dim=-1, descending=True, stable=True)
    right = None if y is None else torch.take_along_dim(y, order[..., None], 1)
    known = norms > least
    left = torch.take_along_dim(x, order[..., None], 1) / torch.where(known, norms, 1.0)[..., None]
    left = _completed(torch.where(known[..., None], left, 0.0), ~known & (status == CONVERGED)[:, None])
    return Rotated(norms, left, right, status, sweeps)


def tournament(players: int) -> list[list[int]]:
    """Whom each of an even number of players meets in each round: everybody everybody once."""
    others = players - 1
    rounds = []
    for turn in range(others):
        row = [(2 * turn - player) % others for player in range(others)]
        row[turn] = others
        rounds.append([*row, turn])
    return rounds


def _rotation(
    x: Tensor, other: Tensor, partner: Tensor, tolerance: float, least: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sines of the smaller angles that make columns (b, m, n) orthogonal to their partners, the tangents of half of
    them, and the sizes of their cosines before, each (b, m). A cosine up to ``tolerance`` is rounding: columns of one
    length would be turned by any angle for it. That of a column no longer than ``least`` (b, 1) counts as zero."""
    product, mine = (x * other).sum(-1), x.square().sum(-1)
    theirs = mine[:, partner]
    lengths = mine.sqrt() * theirs.sqrt()
    known = torch.minimum(mine, theirs).sqrt() > least
    cosines = torch.where(known, product.abs() / torch.where(known, lengths, 1.0), 0.0)
    turns = product.abs() > tolerance * lengths
    zeta = (theirs - mine) / torch.where(turns, 2 * product, 1.0)
    # The partner finds the negative angle; of equal lengths, where both would turn the same way, the second turns back.
    back = (zeta < 0) | ((zeta == 0) & (torch.arange(len(partner), device=x.device) > partner))
    tangent = torch.where(back, -1.0, 1.0).to(x.dtype) / (zeta.abs() + (1 + zeta.square()).sqrt())
    cosine = 1 / (1 + tangent.square()).sqrt()
    sine = torch.where(turns, cosine * tangent, 0.0)
    return sine, sine / (1 + cosine), cosines


def _completed(left: Tensor, missing: Tensor) -> Tensor:
    """``left`` (b, n, n) with rows that are ``missing`` (b, n), and zero, made such that all are orthonormal: each is the
    unit vector that the others hold least of, orthogonalised twice."""
    for k in range(left.shape[1]):
        wanted = missing[:, k]
        if not bool(wanted.any()):
            continue
        held = left.square().sum(1)
        fresh = torch.zeros_like(held).scatter_(1, held.argmin(-1, keepdim=True), 1.0)[:, None]
        for _ in range(2):
            fresh = fresh - (fresh @ left.mT) @ left
        fresh = fresh / fresh.norm(dim=-1, keepdim=True)
        left[:, k] = torch.where(wanted[:, None], fresh[:, 0], left[:, k])
    return left
