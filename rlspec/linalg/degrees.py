"""What a filter is asked for: its degree, and which Ritz vectors corrections are cleared of; and whether float32 can tell
how good the outcome is.

Axes: ``b`` batch, ``k`` wanted columns, ``l`` columns of the searched space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlspec.linalg.chebyshev import degree_for, growth
from rlspec.linalg.products import aligned
from rlspec.linalg.transfer import to_host

_MAX_SKETCH_DEGREE = 6
_MAX_DEGREE = 12
# The filter is asked for this much more than the estimate says is needed: directions near the edge are neither fully
# captured by the sketch nor fully suppressed, and the bound counts every column.
_SAFETY = 300.0
_MAX_LOG_TAKEOVER = math.log(300.0)
_MAX_LOG_TAKEOVER_FINE = math.log(1e4)
# How much more than a column's correction rounding along another Ritz vector may grow before corrections are cleared of
# it, in float32 and in bfloat16; and how near an invariant subspace such a vector must be, as clearing corrections of
# vectors that are themselves far off costs more than it gains.
_MAX_LOG_ROUNDING, _MAX_LOG_ROUNDING_COARSE = math.log(1e5), math.log(3e3)
_SETTLED = 0.1
# With rough products, beyond which nothing is gained: they leave some hundredth of an error.
_COARSE_SUPPRESSION = 1e4


def sketch_degree(at_cut: Tensor, top: Tensor, edge: Tensor, eps: float) -> int:
    """Largest degree that does not drown the directions at the cut in the largest one's growth."""
    limit = math.log(1e5 if eps > 1e-10 else 1e9)
    edge = edge.flatten().double()
    x_top, x_cut = 2.2 * top.double() / edge - 1, 2 * torch.maximum(at_cut, edge) / edge - 1
    degree = 1
    while degree < _MAX_SKETCH_DEGREE:
        if float((growth(x_top, degree + 1) - growth(x_cut, degree + 1)).max()) > limit:
            break
        degree += 1
    return degree


def column_errors(theta: Tensor, residual: Tensor, edge: Tensor, k: int) -> Tensor:
    """Estimates (b, k) of how far each wanted column is from the searched invariant subspace, as a sine."""
    edge = edge.reshape(-1, 1).double()
    distance = (theta[:, :k].double() - edge).clamp_min(1e-3 * edge)
    (lengths,) = to_host([residual[..., :k].norm(dim=-2)])
    return (lengths.double() / distance).clamp(1e-7, 1.0)


def filter_degree(
    theta: Tensor, error: Tensor, edge: Tensor, tol: float, *, coarse: bool, fine: bool
) -> tuple[int, int]:
    """Degree after which each wanted column should be within ``tol`` of the searched invariant subspace; and of how many
    Ritz vectors corrections must be cleared, because rounding along them would grow past what is corrected.

    A lower degree where what is still missing of the other large directions would take over the columns between the cut
    and the edge.

    Args:
        theta: Ritz values (b, l).
        error: of the wanted columns, (b, k).
        edge: (b, 1, 1), positive.
        coarse: the filter's products are rough.
        fine: the basis that comes out is made orthonormal in float64.
    """
    k, edge = error.shape[-1], edge.reshape(-1, 1).double()
    wanted, middle = theta[:, :k].double(), theta[:, [(k + theta.shape[-1]) // 2]].double()
    x, x_middle = ((2 * value / edge - 1).clamp_min(1.0 + 1e-3) for value in (wanted, middle))
    wish = error * (_SAFETY / tol)
    degree = degree_for(wish.clamp_max(_COARSE_SUPPRESSION) if coarse else wish, x, _MAX_DEGREE)
    rounding = _MAX_LOG_ROUNDING_COARSE if coarse else _MAX_LOG_ROUNDING
    most = _MAX_LOG_TAKEOVER_FINE if fine else _MAX_LOG_TAKEOVER
    missing = error.clamp_min(1e-6).log()
    settled = int((error < _SETTLED).all(0).long().cumprod(0).sum())
    while True:
        excess = growth(x, degree) - growth(x_middle, degree)
        # Of the first columns, as values descend.
        held = min(settled, aligned(int((excess > rounding).any(0).sum()), k))
        if degree == 1 or bool(((excess + missing)[:, held:] <= most).all()):
            return degree, held
        degree -= 1


def rounding_blurs(theta: Tensor, k: int, tol: float, eps: float) -> bool:
    """Whether residuals that are taken with products of rounding ``eps`` could hide that ``tol`` is met.

    What they round is ``4 eps σ_1 σ_k`` a column. All wanted columns together divide it by the distance to the last one,
    and a row of what is left between wanted and guard columns by the gap at the cut, which is taken to be the mean of
    those near it. Bounds of attention-like matrices of 2048 and 3584 columns end at a bit under half of that.
    """
    width = theta.shape[-1]
    noise = 4 * eps * (theta[:, 0] * theta[:, k - 1]).clamp_min(0).sqrt()
    near = min(k + 16, width) - 1
    distance = theta[:, k - 1] - theta[:, (k + width) // 2]
    gap = (theta[:, k - 1] - theta[:, near]) / (near + 1 - k)
    floor = noise * (math.sqrt(k) / distance.clamp_min(1e-300) + 1 / gap.clamp_min(1e-300))
    return bool((floor / 2 > 0.75 * tol).any())
