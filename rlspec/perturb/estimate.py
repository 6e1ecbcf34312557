"""How far a candidate pair still is from the true subspaces: estimates, to decide whether to refine it.

The bounds of ``bounds`` hold for the worst angle and the worst value. What decides whether another sweep pays
is the error of all columns together, in the Frobenius norm. It is estimated from a few of them, by the
correction that the next sweep would make to each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.perturb.residual import Residual
from rlspec.perturb.sample import Sample


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


def remaining_error(sample: Sample, left_over: Residual) -> Remaining:
    """Estimate the errors of a pair from what it leaves over on a sample of its columns."""
    k, few = sample.k, sample.estimated
    columns = list(sample.columns[few])
    sigma = left_over.sigma[..., columns]
    core_left, core_right = left_over.core_left[..., few], left_over.core_right[..., few]
    weights = _weights(sample)
    subspace = torch.zeros_like(sigma[..., 0])
    spectrum = torch.zeros_like(subspace)
    for turn, rotated, spread, couplings in (
        (left_over.turn_left, left_over.rotated_left, left_over.spread_left, (core_right, core_left)),
        (left_over.turn_right, left_over.rotated_right, left_over.spread_right, (core_left, core_right)),
    ):
        square = turn + _mixing(left_over.sigma, sigma, *couplings, k).square().sum(-2)
        missing = (square * weights).sum(-1).sqrt() / rotated
        subspace = torch.maximum(subspace, missing)
        spectrum = torch.maximum(spectrum, missing / _directions(spread, k).sqrt() + missing.square())
    own = core_left[..., columns, range(len(columns))]
    return Remaining(subspace, spectrum, ((own.abs() + left_over.second.abs()) / sigma).amax(-1))


def _directions(gram: Tensor, k: int) -> Tensor:
    """(L,) how many directions carry T, (Σ s²)² / Σ s⁴ of its singular values s, from the Gram matrix (L, s, s) of
    sampled columns of it."""
    spread = gram.shape[-1]
    if spread < 2:
        return torch.ones(gram.shape[0], dtype=torch.float64)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    whole = squares.mean(-1) * k
    off = (gram.square().sum((-2, -1)) - squares.square().sum(-1)) / (spread * (spread - 1)) * k * (k - 1)
    fourth = squares.square().mean(-1) * k + off
    return (whole.square() / fourth.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(1.0)


def _mixing(values: Tensor, sigma: Tensor, first: Tensor, second: Tensor, k: int) -> Tensor:
    """(L, w - k, e) rotation of sampled columns towards the pair's columns past the cut, from the core's error."""
    beyond, mine = values[..., k:].unsqueeze(-1), sigma.unsqueeze(-2)
    gap = (mine - beyond) * (mine + beyond)
    coupling = beyond * first[..., k:, :] + mine * second[..., k:, :]
    turned = coupling / gap.clamp_min(torch.finfo(torch.float64).tiny)
    return turned.clamp(-1.0, 1.0)  # nothing turns by more


def _weights(sample: Sample) -> Tensor:
    """(e,) how many of the k columns each estimated one stands for."""
    rest = sample.k - sample.cut
    spread = [rest / max(sample.spread, 1)] * sample.spread
    return torch.tensor(spread + [1.0] * sample.cut, dtype=torch.float64)
