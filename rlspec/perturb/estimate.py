"""How far a candidate pair still is from the true subspaces: estimates, to decide whether to refine it.

The bounds of ``bounds`` hold for the worst angle and the worst value. What decides whether another sweep pays
is the error of all columns together, in the Frobenius norm. It is estimated from a few of them, by the
correction that the next sweep would make to each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.perturb.coordinates import Pair, Side, apply, scale
from rlspec.perturb.delta import Delta, frobenius
from rlspec.perturb.first_order import rotation
from rlspec.perturb.reference import Reference

_SPREAD = 12  # columns taken evenly over all followed ones
_EDGE = 4  # columns next to the cut, where corrections are largest, taken one by one


@dataclass(frozen=True)
class Remaining:
    """Estimated relative errors of a pair's leading k columns, each (L,) float64, the larger side's.

    ``subspace``: ||dT||_F / ||T||_F, where T holds the sines (what the columns have outside the reference's
    leading subspace) and dT is missing from it. ``spectrum``: of the sines as a list, in the same norm. An error
    in a direction of its own changes it at second order only, and a random one mostly has such directions: the
    share of dT that does not is 1 over the number of directions that carry T. ``sigma``: of the worst singular
    value.
    """

    subspace: Tensor
    spectrum: Tensor
    sigma: Tensor


def remaining_error(reference: Reference, delta: Delta, pair: Pair) -> Remaining:
    """Estimate the errors of a pair.

    Args:
        delta: E, with products in the dtype of the factors.
        pair: w >= k columns with their core diagonal.
    """
    k, w = reference.k, pair.sigma.shape[-1]
    columns, weights = _sample(k, pair.sigma)
    sigma = pair.sigma[..., columns]
    left, right = pair.left.take(columns), pair.right.take(columns)
    residual_left = apply(reference, delta, right) - scale(left, sigma)
    residual_right = apply(reference, delta, left, transpose=True) - scale(right, sigma)
    turn_right, turn_left = rotation(reference.S[..., w:], sigma, residual_left.tail, residual_right.tail)
    core_left, core_right = pair.left.dot(residual_left), pair.right.dot(residual_right)
    subspace = torch.zeros_like(sigma[..., 0])
    spectrum = torch.zeros_like(subspace)
    for side, sampled, turn, residual, couplings in (
        (pair.left, left, turn_left, residual_left, (core_right, core_left)),
        (pair.right, right, turn_right, residual_right, (core_left, core_right)),
    ):
        square = turn.double().square().sum(-2)
        square = square + _mixing(pair.sigma, sigma, *couplings, k).square().sum(-2)
        if residual.outside is not None:
            square = square + (residual.outside.double() / sigma.unsqueeze(-2)).square().sum(-2)
        missing = (square * weights).sum(-1).sqrt() / rotated(side, k)
        subspace = torch.maximum(subspace, missing)
        spectrum = torch.maximum(spectrum, missing / _directions(sampled, k).sqrt() + missing.square())
    own = core_left.gather(-2, columns.expand(*core_left.shape[:-2], 1, -1)).squeeze(-2)
    second = ((residual_left.tail * turn_left).sum(-2) + (residual_right.tail * turn_right).sum(-2)).double()
    return Remaining(subspace, spectrum, ((own.abs() + second.abs()) / sigma).amax(-1))


def rotated(side: Side, k: int) -> Tensor:
    """(L,) Frobenius norm of the sines of the first k columns; at least the dtype's rounding."""
    return frobenius(side.rows(k, k)).clamp_min(torch.finfo(side.tail.dtype).eps)


def _directions(sampled: Side, k: int) -> Tensor:
    """(L,) how many directions carry T, (Σ s²)² / Σ s⁴ of its singular values s, from sampled columns of it."""
    spread = sampled.lead.shape[-1] - min(_EDGE, k)
    if spread < 2:
        return torch.ones_like(sampled.lead[..., 0, 0])
    t = sampled.rows(k, spread).double()
    gram = t.mT @ t
    squares = gram.diagonal(dim1=-2, dim2=-1)
    whole = squares.mean(-1) * k
    off = (gram.square().sum((-2, -1)) - squares.square().sum(-1)) / (spread * (spread - 1)) * k * (k - 1)
    fourth = squares.square().mean(-1) * k + off
    return (whole.square() / fourth.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(1.0)


def _mixing(values: Tensor, sigma: Tensor, first: Tensor, second: Tensor, k: int) -> Tensor:
    """(L, w - k, c) rotation of sampled columns towards the pair's columns past the cut, from the core's error."""
    beyond, mine = values[..., k:].unsqueeze(-1), sigma.unsqueeze(-2)
    gap = (mine - beyond) * (mine + beyond)
    coupling = beyond * first[..., k:, :] + mine * second[..., k:, :]
    turned = coupling / gap.clamp_min(torch.finfo(torch.float64).tiny)
    return turned.clamp(-1.0, 1.0)  # nothing turns by more


def _sample(k: int, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of sampled columns (c,) int64, and how many columns each stands for (c,) float64."""
    edge = min(_EDGE, k)
    last = list(range(k - edge, k))
    rest = k - edge
    spread = min(_SPREAD, rest)
    even = [(2 * i + 1) * rest // (2 * spread) for i in range(spread)]
    weights = [rest / max(spread, 1)] * spread + [1.0] * edge
    columns = torch.tensor(even + last, device=sigma.device)
    return columns, torch.tensor(weights, dtype=torch.float64, device=sigma.device)
