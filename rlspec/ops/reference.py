"""Each operation once more in plain float64, without cleverness: what the fast ones are tested against.

Only tests and bench import this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.ops.chebyshev_step import Correction
from rlspec.ops.delta_stats import DeltaStats


def delta_ref(weight: Tensor, reference: Tensor) -> Tensor:
    """E in float64, (L, m, n)."""
    return weight.double() - reference.double()


def delta_stats_ref(weight: Tensor, reference: Tensor, *, eta: float) -> DeltaStats:
    """See :func:`rlspec.ops.delta_stats.delta_stats`."""
    w, ref = weight.double(), reference.double()
    delta = w - ref
    unchanged = delta.abs() <= eta * torch.maximum(w.abs(), ref.abs())
    delta_sq, weight_sq, reference_sq = (x.square().sum((-2, -1)) for x in (delta, w, ref))
    return DeltaStats(delta_sq, weight_sq, reference_sq, unchanged.sum((-2, -1)))


def delta_matmul_ref(weight: Tensor, reference: Tensor, x: Tensor) -> Tensor:
    """See :func:`rlspec.ops.delta_matmul.delta_matmul`."""
    return delta_ref(weight, reference) @ x.double()


def delta_rmatmul_ref(weight: Tensor, reference: Tensor, y: Tensor) -> Tensor:
    """See :func:`rlspec.ops.delta_matmul.delta_rmatmul`."""
    return delta_ref(weight, reference).mT @ y.double()


def add_rounded_ref(tuned: Tensor, change: Tensor, strength: float, dtype: torch.dtype) -> Tensor:
    """See :func:`rlspec.ops.add_rounded.add_rounded`, to nearest: of the neighbours of the exact sum in ``dtype``, the
    one that is nearer, the old value where it is as near as any.

    For finite sums inside the range of ``dtype``.
    """
    exact = tuned.double() + strength * change.double()
    kept, nearest = tuned.to(dtype), exact.to(dtype)
    up, down = torch.full_like(nearest, torch.inf), torch.full_like(nearest, -torch.inf)
    best = kept
    for candidate in (nearest, torch.nextafter(nearest, up), torch.nextafter(nearest, down)):
        nearer = (candidate.double() - exact).abs() < (best.double() - exact).abs()
        best = torch.where(nearer, candidate, best)
    return best


def add_low_rank_ref(tuned: Tensor, left: Tensor, right: Tensor, strength: float) -> Tensor:
    """See :func:`rlspec.ops.add_low_rank.add_low_rank`, before rounding: float64."""
    return tuned.double() + strength * (left.double() @ right.double().mT)


def gram_ref(a: Tensor) -> Tensor:
    """See :func:`rlspec.ops.gram.gram`."""
    return a.double().mT @ a.double()


def chebyshev_step_ref(
    moments: Tensor, current: Tensor, previous: Tensor, edge: Tensor, correction: Correction | None = None
) -> Tensor:
    """See :func:`rlspec.ops.chebyshev_step.chebyshev_step`, with a previous block; ``moments`` is C."""
    moments, current, previous, edge = (t.double() for t in (moments, current, previous, edge))
    step = 4 / edge * (moments @ current) - 2 * current
    if correction is None:
        return step - previous
    step = step + 4 / edge * correction.residual.double() - correction.ratio.double() * previous
    return correction.following.double() * step


def residual_norms_ref(a: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """See :func:`rlspec.ops.residual_norms.residual_norms`."""
    a, u, s, v = (t.double() for t in (a, u, s, v))
    right, left = a @ v - u @ torch.diag_embed(s), a.mT @ u - v @ torch.diag_embed(s)
    return torch.maximum(right.square().sum(-2), left.square().sum(-2)).sqrt()


def sylvester_rotation_ref(
    tail: Tensor, leading: Tensor, left: Tensor, right: Tensor, *, floor: float
) -> tuple[Tensor, Tensor]:
    """See :func:`rlspec.ops.sylvester_rotation.sylvester_rotation`."""
    s2, s1, left, right = (t.double() for t in (tail.unsqueeze(-1), leading.unsqueeze(-2), left, right))
    between = torch.maximum(s1.square() - s2.square(), floor * s1.square())
    return (s2 * left + s1 * right) / between, (s1 * left + s2 * right) / between


def jacobi_ref(g: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`rlspec.linalg.jacobi.Rotated`: values, left and right vectors, up to signs and equal values' turns."""
    u, s, wh = torch.linalg.svd(g.double().mT)
    return s, u.mT, None if v is None else wh @ v.double()
