"""How wrong the part of W along some columns of a pair is: an estimate, on the safe side.

Axes: ``L`` matrices (m, n), ``w`` columns of the pair, I = [start, stop) those that are meant. The part is
T = Y_I Σ_I X_Iᵀ. What the pair leaves over turns columns of I towards others, which moves T by σ_j times the turn; or it
lies between columns of I, where it is an error of T as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlspec.perturb.estimate import turned
from rlspec.perturb.reference import FLOOR, Reference
from rlspec.perturb.residual import Residual
from rlspec.perturb.sample import sampled_frobenius

# A few columns stand for all, and turns are told to first order.
_SAFETY = 2.0
# An entry of the error that a float64 decomposition makes, over eps σ_1.
_ENTRY = 2.0


def part_error(reference: Reference, left_over: Residual, start: int) -> Tensor:
    """(L,) Frobenius norm of the error of T, I = [start, k), from what the pair leaves over."""
    sample, values, k = reference.sample, left_over.sigma, reference.k
    stretch = _stretch(reference, values).square()
    turns = replace(
        left_over, turn_left=left_over.turn_left * stretch, turn_right=left_over.turn_right * stretch
    )
    left, right = turned(sample, turns, start)
    largest = values[..., [max(first, start) for first in sample.borders[:-1]]]
    within = torch.tensor([stop > start for stop in sample.borders[1:]], dtype=torch.float64)
    moved = (within * largest.square() * (left + right)).sum(-1)
    inside = [core[..., start:k, sample.signs] for core in (left_over.core_left, left_over.core_right)]
    core = torch.maximum(*(sampled_frobenius(products) for products in inside))
    return _SAFETY * (moved + core.square()).sqrt()


def _stretch(reference: Reference, sigma: Tensor) -> Tensor:
    """(L, e) by how much larger turns are than those towards the reference's tail, whose values E lifts as well: as much
    as it does those of the guard band, it is taken."""
    sample, before, w = reference.sample, reference.values, sigma.shape[-1]
    if w >= before.shape[-1]:
        return torch.ones(())
    guard = slice(min(reference.k, w - 1), w)
    mine, top = sigma[..., [stop - 1 for stop in sample.borders[1:]]], before[..., w, None]
    lift = (sigma[..., guard] - before[..., guard]).amax(-1, keepdim=True).clamp_min(0.0)
    lifted = torch.minimum(top + lift, torch.maximum(top, sigma[..., -1:]))
    gaps = [((mine - value) * (mine + value)).clamp_min(FLOOR * mine.square()) for value in (top, lifted)]
    return gaps[0] / gaps[1]


def part_rounding(values: Tensor, start: int, stop: int, shape: tuple[int, int], rounding: Tensor) -> Tensor:
    """(L,) Frobenius norm of the error of T that rounding of W brings about, spread evenly over its entries.

    Args:
        values: of W, descending, (L, v) float64, v >= stop.
        shape: (m, n).
        rounding: Frobenius norm of what is rounded, (L,); that of float64 decompositions comes on top.
    """
    m, n = shape
    entry = rounding / (m * n) ** 0.5 + _ENTRY * torch.finfo(torch.float64).eps * values[..., 0]
    mine = values[..., start:stop].unsqueeze(-1)
    others = torch.cat([values[..., :start], values[..., stop:]], dim=-1).unsqueeze(-2)
    gap = (mine - others).abs().clamp_min(torch.finfo(torch.float64).tiny)
    turned = (entry[..., None, None] / gap).clamp_max(1.0)
    moved = (mine * turned).square().sum((-2, -1))
    # Both vectors of a pair turn. What lies outside the thin factors turns columns by the entry over their own value.
    beside = (m + n - 2 * values.shape[-1] + stop - start) * (stop - start)
    return _SAFETY * (2.0 * moved + beside * entry.square()).sqrt()
