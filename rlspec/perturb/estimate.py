"""How far a candidate pair still is from the true subspaces: estimates, to decide whether to refine it.

The bounds of ``bounds`` hold for the worst angle and the worst value. What decides whether another sweep pays
is the error of all columns together, in the Frobenius norm. It is estimated from a few combinations of them, by the
correction that the next sweep would make to each: with random signs, squared norms of combinations add up to those of
their columns, on average.

Axes: ``L`` matrices, ``w`` columns of a pair, ``e`` combinations.
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
    core_left = left_over.core_left[..., few]
    turns = turned(sample, left_over)
    subspace = torch.zeros_like(turns[0][..., 0])
    spectrum = torch.zeros_like(subspace)
    for turn, rotated, spread in zip(
        turns,
        (left_over.rotated_left, left_over.rotated_right),
        (left_over.spread_left, left_over.spread_right),
    ):
        missing = turn.sum(-1).sqrt() / rotated
        subspace = torch.maximum(subspace, missing)
        spectrum = torch.maximum(spectrum, missing / _directions(sample, spread).sqrt() + missing.square())
    own = (sample.neighbours * core_left[..., :k, :]).sum(-2)
    smallest, escaped = _smallest(sample, left_over), _escaped(sample, left_over)
    second = torch.maximum(left_over.second.abs(), escaped / (smallest + left_over.sigma[..., k - 1, None]))
    wrong = (own.abs() + second) / sample.sizes
    return Remaining(subspace, spectrum, (wrong / smallest).amax(-1))


def turned(sample: Sample, left_over: Residual, start: int = 0) -> tuple[Tensor, Tensor]:
    """How far the columns of each estimated combination still have to turn away from those of columns [start, k).

    Returns:
        Of the left and of the right basis: squared norms, (L, e), summed up over the columns of a combination.
    """
    few, k, values = sample.estimated, sample.k, left_over.sigma
    core_left, core_right = left_over.core_left[..., few], left_over.core_right[..., few]
    nearest = _smallest(sample, left_over)
    # Turns are those of tail coordinates, as long as the pair spans the leading ones. Where a column past the cut has
    # gone to the tail it does not; a column turns by what escapes the spans over the sum of two values at least.
    least = 0.5 * _escaped(sample, left_over) / (nearest + values[..., k - 1, None]).square()
    left = torch.maximum(left_over.turn_left, least)
    right = torch.maximum(left_over.turn_right, least)
    left = left + _mixing(values, nearest, core_right, core_left, slice(k, None))
    right = right + _mixing(values, nearest, core_left, core_right, slice(k, None))
    if start > 0:
        nearest = values[..., [max(first, start) for first in sample.borders[:-1]]]
        left = left + _mixing(values, nearest, core_right, core_left, slice(start))
        right = right + _mixing(values, nearest, core_left, core_right, slice(start))
    return left, right


def _smallest(sample: Sample, left_over: Residual) -> Tensor:
    """(L, e) the smallest value of each estimated combination."""
    return left_over.sigma[..., [stop - 1 for stop in sample.borders[1:]]]


def _escaped(sample: Sample, left_over: Residual) -> Tensor:
    """(L, e) squared norms of what an estimated combination leaves over outside of the spans, both sides'."""
    few = sample.estimated
    return left_over.outside[:, few, few].diagonal(dim1=-2, dim2=-1)


def _directions(sample: Sample, gram: Tensor) -> Tensor:
    """(L,) how many directions carry T, (Σ s²)² / Σ s⁴ of its singular values s, from the Gram matrix (L, s, s) of
    combinations of neighbouring columns of it."""
    sizes = sample.sizes[: gram.shape[-1]]
    columns = sizes.sum()
    pairs = columns.square() - sizes.square().sum()  # of columns in two combinations
    if not pairs > 0:
        return torch.ones(gram.shape[0], dtype=torch.float64)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    off = gram.square().sum((-2, -1)) - squares.square().sum(-1)
    fourth = (squares.square() / sizes).sum(-1) + off * (columns * (columns - 1.0) / pairs)
    whole = squares.sum(-1)
    return (whole.square() / fourth.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(1.0)


def _mixing(values: Tensor, sigma: Tensor, first: Tensor, second: Tensor, others: slice) -> Tensor:
    """(L, e) squared norms of the rotation of combinations towards some others of the pair's columns, from the core's
    error: with ``sigma`` (L, e) the value of the column nearest to those."""
    theirs, mine = values[..., others].unsqueeze(-1), sigma.unsqueeze(-2)
    gap = ((mine - theirs) * (mine + theirs)).abs()
    coupling = theirs * first[..., others, :] + mine * second[..., others, :]
    turned = coupling / gap.clamp_min(torch.finfo(torch.float64).tiny)
    return turned.clamp(-1.0, 1.0).square().sum(-2)  # nothing turns by more
