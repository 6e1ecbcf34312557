"""How wrong a candidate subspace can be, from what it leaves over on a sample of its columns (``residual``).

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

from rlspec.linalg.dense import values_of_gram
from rlspec.ops.gram import product_eps
from rlspec.perturb.reference import Reference
from rlspec.perturb.residual import Residual
from rlspec.perturb.sample import sampled_frobenius

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


def residual_bounds(
    reference: Reference, left_over: Residual, scale: Tensor, outside: Tensor, taken: torch.dtype
) -> Bounds:
    """Bounds on the leading k values and angles of a pair, from what it leaves over.

    Args:
        scale: ||E||_F, (L,) on the host.
        outside: what the largest value outside of the pair may be, (L,) on the host, see ``largest_outside``.
        taken: the dtype that E was taken in; its entries were rounded to it.
    """
    sample, k = reference.sample, reference.k
    values = reference.values
    sigma, w = left_over.sigma, left_over.sigma.shape[-1]
    edges, signs = sample.edges, sample.signs
    # Inside the span: the error of the core, seen from both sides.
    core_left, core_right = left_over.core_left, left_over.core_right
    core = torch.cat([core_left[..., signs], core_right[..., signs]], dim=-2)
    core_norm = sampled_frobenius(core) / math.sqrt(2.0)
    entry = core_norm / math.sqrt(k * w)
    entry = entry * _unevenness(core_left[..., signs]) * _unevenness(core_right[..., signs])
    largest = torch.maximum(core_left[..., edges].abs(), core_right[..., edges].abs())
    entry = torch.maximum(entry, largest.amax((-2, -1)) / _EXTREME)

    # Outside it: what would turn the subspace or move the values at second order.
    beyond = torch.maximum(_beyond(values, sigma, w), outside)
    gaps = (sigma[..., :k] - beyond.unsqueeze(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    # Columns divided by their gap give the missing rotation; sampled columns share the smallest gap.
    edge_gaps = gaps[..., [sample.borders[e] for e in edges]]
    escaped = left_over.outside
    at_edges = escaped[:, edges][..., edges]
    sampled = escaped[:, signs, signs]
    weight = 1.0 / gaps[..., -1]
    turn = torch.maximum(
        weight * _spectral_norm(sampled) / math.sqrt(sampled.shape[-1]),
        _spectral_norm(at_edges / (edge_gaps.unsqueeze(-1) * edge_gaps.unsqueeze(-2))),
    )
    mixing = entry * _mixing(sigma, k)
    edge_squares = at_edges.diagonal(dim1=-2, dim2=-1)
    typical = sampled.diagonal(dim1=-2, dim2=-1).mean(-1) / k
    second_order = torch.maximum((edge_squares / edge_gaps).amax(-1), _EXTREME**2 * typical / gaps[..., -1])
    # The reference's coordinates are exact by definition, so rounding enters relative to E only: that of its entries,
    # which no residual shows, and that of products, whose bias residuals share: tensor cores cut sums off towards zero.
    products = product_eps(reference.device, reference.U.dtype)
    rounding = (products + 0.5 * torch.finfo(taken).eps) * scale
    # Rounding turns vectors by its size over the gap at the cut: that of the products with E, and that of the float64
    # decompositions of the reference and the core.
    own = 16.0 * torch.finfo(torch.float64).eps * sigma[..., 0]
    rounding_turn = (rounding + own) / torch.minimum(_gap(values, k), _gap(sigma, k))
    return Bounds(
        sigma=_EXTREME * entry
        + second_order
        + rounding
        + 32.0 * torch.finfo(torch.float64).eps * sigma[..., 0],
        angle=(turn + mixing + rounding_turn + _ANGLE_FLOOR).clamp_max(math.pi / 2),
    )


def _spectral_norm(gram: Tensor) -> Tensor:
    """(L,) largest singular value of what has the Gram matrix (L, c, c)."""
    return values_of_gram(gram)[..., 0]


def _gap(sigma: Tensor, k: int) -> Tensor:
    """(L,) between the k-th value and the next, or zero past the last."""
    below = sigma[..., k] if k < sigma.shape[-1] else torch.zeros_like(sigma[..., 0])
    return (sigma[..., k - 1] - below).clamp_min(torch.finfo(torch.float64).tiny)


def _unevenness(products: Tensor) -> Tensor:
    """(L,) how far the longest row of A stands out, from ``A ω`` (L, q, c) for random sign columns: 1 for random ones.

    The two sides see the same error of the core, one by its rows and one by its columns; where it sits in a few
    entries, as a low-rank update can bring about, the typical entry says little about the largest.
    """
    rows = products.square().mean(-1).sqrt()
    typical = rows.square().mean(-1).sqrt()
    return (rows.amax(-1) / (_CHANCE * typical).clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(1.0)


def _beyond(values: Tensor, sigma: Tensor, w: int) -> Tensor:
    """(L,) what the largest singular value outside the candidate span is at most expected to be."""
    if w >= values.shape[-1]:
        return torch.zeros_like(sigma[..., 0])
    shift = (sigma - values[..., :w]).abs().amax(-1)
    return torch.minimum(values[..., w] + shift, sigma[..., w - 1])


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
