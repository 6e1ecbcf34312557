"""How wrong a candidate subspace can be, from its residuals on a few columns.

For an orthonormal pair with core diag(σ), the residuals ``W x_j - σ_j y_j`` and ``Wᵀ y_j - σ_j x_j`` hold
everything that is missing. Their part inside the candidate's own span is the error of the core, their part
outside is what would still turn the subspace. Both are measured, not modelled: the products that give them
are taken afresh, in the accuracy of the factors, so the rounding of the fast products shows up in them too.

A few columns suffice: random signs over all followed columns (the norm of the whole from a sample of its
range), and, one by one, the columns where trouble sits: next to the cut, where the gap is smallest, and at
the top, where the values are largest.

These are bounds in practice, not in theory: a norm is sampled, and the spectrum past the candidate span is the
reference's, shifted. The constants were set on some 20,000 random trials. Of 21,600 others, drawn once they were
settled, none exceeded its bound (so fewer than 1 in 7,000 of this kind do, at 95 % confidence); the median bound is some
20 times the error. At r of 400 to 800 with float32 factors none of 400 did, and the median is some 35 times the error of
a value and 90 times that of an angle. A thousand trials are in the tests, and a hundred at those sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.spectra.measurement import ReferenceStack
from rlspec.spectra.metrics import frobenius
from rlspec.spectra.subspace import Pair, Side, apply

_PROBES = 16  # random sign combinations
_EDGE = 4  # columns taken one by one at the cut and at the top
# Factors on the estimates below: a sampled norm against the true one, and an extreme entry against the
# typical one (entries of a residual are near normal; the largest of a few hundred lies near 3.5 standard
# deviations).
_NORM = 2.0
_EXTREME = 4.0
_CHANCE = 1.7  # the largest of some hundred row norms sampled by 16 signs, over the typical one
_ANGLE_FLOOR = 1e-14  # float64 sines of small angles


@dataclass(frozen=True)
class Bounds:
    """Absolute bounds, each (L,) float64: on every singular value, and on how far any principal angle (radians) is
    off by the subspaces; what is lost by taking it from its sine comes on top (:func:`arcsine_rounding`)."""

    sigma: Tensor
    angle: Tensor


def probe_bounds(reference: ReferenceStack, delta: Tensor, pair: Pair) -> Bounds:
    """Bounds on the leading k values and angles of a pair, from residuals on a sample of its columns.

    Args:
        delta: E, (L, m, n), in the dtype of the factors.
        pair: w >= k columns with their core diagonal.
    """
    k, w = reference.k, pair.sigma.shape[-1]
    sample = _sample(k, w, pair.sigma)
    scaled = pair.sigma.unsqueeze(-1) * sample
    left, right = pair.columns(sample, sample)
    left_scaled, right_scaled = pair.columns(scaled, scaled)
    residual_left = apply(reference, delta, right) - left_scaled
    residual_right = apply(reference, delta, left, transpose=True) - right_scaled
    return residual_bounds(reference, pair, residual_left, residual_right, sample, frobenius(delta))


def residual_bounds(
    reference: ReferenceStack,
    pair: Pair,
    residual_left: Side,
    residual_right: Side,
    sample: Tensor,
    scale: Tensor,
) -> Bounds:
    """Bounds from residuals ``W X ω - Y σ ω`` (left coordinates) and ``Wᵀ Y ω - X σ ω`` on combinations ω.

    Args:
        sample: ω, (L, w, c): edge columns first, then sign combinations, as :func:`_sample` makes them.
        scale: ||E||_F, (L,).
    """
    k, w = reference.k, pair.sigma.shape[-1]
    edges = _edge_columns(k)
    # Inside the span: the error of the core, seen from both sides.
    core_left, core_right = pair.left.dot(residual_left), pair.right.dot(residual_right)
    # Outside it: what would turn the subspace or move the values at second order.
    outside_left = residual_left - pair.left @ core_left
    outside_right = residual_right - pair.right @ core_right
    outside = torch.cat([outside_left.rows(), outside_right.rows()], dim=-2).double()

    signs = sample.shape[-1] - len(edges)
    core = torch.cat([core_left, core_right], dim=-2)
    core_norm = _sampled_frobenius(core[..., len(edges) :]) / math.sqrt(2.0)
    entry = core_norm / math.sqrt(k * w)
    entry = entry * _unevenness(core_left[..., len(edges) :]) * _unevenness(core_right[..., len(edges) :])
    if edges:
        largest = torch.maximum(core_left[..., : len(edges)].abs(), core_right[..., : len(edges)].abs())
        entry = torch.maximum(entry, largest.amax((-2, -1)) / _EXTREME)

    beyond = _beyond(reference, pair, w)
    gaps = (pair.sigma[..., :k] - beyond.unsqueeze(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    # Columns divided by their gap give the missing rotation; sampled columns share the smallest gap.
    edge_gaps = gaps[..., edges].unsqueeze(-2)
    edge_turn = outside[..., : len(edges)] / edge_gaps
    weight = 1.0 / gaps[..., -1]
    turn = torch.maximum(
        weight * torch.linalg.matrix_norm(outside[..., len(edges) :], ord=2) / math.sqrt(signs),
        torch.linalg.matrix_norm(edge_turn, ord=2) if edges else torch.zeros_like(weight),
    )
    mixing = entry * _mixing(pair.sigma, k)
    edge_norm = outside[..., : len(edges)].norm(dim=-2)
    typical = _sampled_frobenius(outside[..., len(edges) :]) / math.sqrt(k)
    second_order = torch.maximum(
        (edge_norm.square() / edge_gaps.squeeze(-2)).amax(-1), _EXTREME**2 * typical.square() / gaps[..., -1]
    )
    # The reference's coordinates are exact by definition, so rounding enters relative to E only.
    rounding = torch.finfo(reference.U.dtype).eps * scale
    # Rounding turns vectors by its size over the gap at the cut: that of the products with E, and that of the float64
    # decompositions of the reference and the core.
    own = 16.0 * torch.finfo(torch.float64).eps * pair.sigma[..., 0]
    rounding_turn = (rounding + own) / torch.minimum(_gap(reference.S, k), _gap(pair.sigma, k))
    return Bounds(
        sigma=_EXTREME * entry
        + second_order
        + rounding
        + 32.0 * torch.finfo(torch.float64).eps * pair.sigma[..., 0],
        angle=(turn + mixing + rounding_turn + _ANGLE_FLOOR).clamp_max(math.pi / 2),
    )


def _gap(sigma: Tensor, k: int) -> Tensor:
    """(L,) between the k-th value and the next, or zero past the last."""
    below = sigma[..., k] if k < sigma.shape[-1] else torch.zeros_like(sigma[..., 0])
    return (sigma[..., k - 1] - below).clamp_min(torch.finfo(torch.float64).tiny)


def _edge_columns(k: int) -> list[int]:
    """Columns examined one by one: the last and the first few of the k."""
    return sorted({*range(max(0, k - _EDGE), k), *range(min(_EDGE, k))})


def _sample(k: int, w: int, sigma: Tensor) -> Tensor:
    """(L, w, c): unit columns for the edges, then random signs over the first k. The signs are fixed by k
    alone."""
    edges = _edge_columns(k)
    generator = torch.Generator().manual_seed(k)
    signs = torch.randint(0, 2, (k, _PROBES), generator=generator).double() * 2.0 - 1.0
    sample = torch.zeros(w, len(edges) + _PROBES, dtype=torch.float64)
    for column, index in enumerate(edges):
        sample[index, column] = 1.0
    sample[:k, len(edges) :] = signs
    return sample.to(sigma.device).expand(sigma.shape[0], -1, -1)


def _unevenness(products: Tensor) -> Tensor:
    """(L,) how far the longest row of A stands out, from ``A ω`` (L, q, c) for random sign columns: 1 for random ones.

    The two sides see the same error of the core, one by its rows and one by its columns; where it sits in a few
    entries, as a low-rank update can bring about, the typical entry says little about the largest.
    """
    rows = products.square().mean(-1).sqrt()
    typical = rows.square().mean(-1).sqrt()
    return (rows.amax(-1) / (_CHANCE * typical).clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(1.0)


def _sampled_frobenius(products: Tensor) -> Tensor:
    """Frobenius norm of A from ``A ω`` for random sign columns ω, (L, q, c) -> (L,)."""
    return (products.square().sum((-2, -1)) / products.shape[-1]).sqrt()


def _beyond(reference: ReferenceStack, pair: Pair, w: int) -> Tensor:
    """(L,) what the largest singular value outside the candidate span is at most expected to be."""
    r = reference.S.shape[-1]
    if w >= r:
        return torch.zeros_like(pair.sigma[..., 0])
    shift = (pair.sigma - reference.S[..., :w]).abs().amax(-1)
    return torch.minimum(reference.S[..., w] + shift, pair.sigma[..., w - 1])


def _mixing(sigma: Tensor, k: int) -> Tensor:
    """(L,) norm of the rotation across the cut that core errors of unit typical entry cause.

    Entry (i, j) of the error turns column j <= k towards column i > k by its size over σ_j - σ_i. The norm
    of such a matrix is that of its largest entry where one near-degenerate pair dominates, that of its bulk
    otherwise.
    """
    if k >= sigma.shape[-1]:
        return torch.zeros_like(sigma[..., 0])
    gaps = sigma[..., None, :k] - sigma[..., k:, None]
    inverse = 1.0 / gaps.clamp_min(torch.finfo(torch.float64).tiny)
    bulk = inverse.square().sum((-2, -1)).sqrt()
    return torch.maximum(_EXTREME * inverse.amax((-2, -1)), _NORM * bulk)
