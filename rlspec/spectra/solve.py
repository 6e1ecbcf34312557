"""The leading singular subspaces of W_ref + E from the reference's factors: first order, then sweeps where needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.linalg.products import ALIGNED
from rlspec.spectra.batch import take
from rlspec.spectra.estimate import remaining_error, rotated
from rlspec.spectra.measurement import ReferenceStack
from rlspec.spectra.metrics import Update
from rlspec.spectra.refine import refine
from rlspec.spectra.subspace import Pair, diagonalise
from rlspec.spectra.sylvester import FLOOR, first_order

# Good enough for a spectrum of angles right to 1e-3 and values right to 1e-6, by the estimates of ``estimate``: what
# first order leaves over is random, and most of the estimate shows in the spectrum; what a sweep leaves over is
# not, and half of it shows in the spectrum whatever its direction.
_SPECTRUM, _SUBSPACE, _SIGMA = 1.25e-3, 2e-3, 5e-7
_SWEEPS = 6
_PROGRESS = 0.5  # a sweep that leaves more than this share of the error does not pay
# Where sweeps stop short of the tolerances, rounding has been reached, and not the end of the perturbative regime,
# as long as the error of the subspaces (a share of their rotation) and of the values is below this. A full
# decomposition in the accuracy of the factors would do no better.
_STALLED_SUBSPACE, _STALLED_SIGMA = 1e-2, 1e-6
_CHOICE = 4  # widths to choose a gap from


@dataclass(frozen=True)
class Solution:
    """Leading subspaces of L matrices: the ``pair`` (w >= k columns) and how far it got.

    ``delta`` is E in the dtype of the factors, ``block`` is U1ᵀ E V1 (L, w, w) float64; ``settled`` (L,) bool says which
    are good enough. Estimated errors, (L,) float64: ``subspace`` as a share of ``rotation``, the Frobenius norm of
    the sines; ``sigma`` relative.
    """

    pair: Pair
    delta: Tensor
    block: Tensor
    settled: Tensor
    subspace: Tensor
    rotation: Tensor
    sigma: Tensor


def solve(reference: ReferenceStack, change: Update, *, subspace_tolerance: float = 1.0) -> Solution:
    """The leading subspaces of W_ref + E, where :func:`is_perturbation`.

    Args:
        subspace_tolerance: error of the subspaces to reach, as a share of their rotation, Frobenius norms. Angles
            need no more than what is asked for anyway; a restored weight is as wrong as the subspaces are.
    """
    delta = change.delta.to(reference.U.dtype)
    left, right, core, grams, block = first_order(reference, delta, leading_columns(reference))
    pair = diagonalise(left, right, core, grams)
    found = remaining_error(reference, delta, pair)
    settled = (found.spectrum <= _SPECTRUM) & (found.subspace <= subspace_tolerance) & (found.sigma <= _SIGMA)
    settled |= change.delta_frobenius == 0
    error, sigma, pending = found.subspace, found.sigma, (~settled).nonzero().flatten()
    for _ in range(_SWEEPS):
        if pending.numel() == 0:
            break
        part, changed = reference.select(pending), take(delta, pending)
        refined = refine(part, changed, pair.select(pending))
        pair = pair.replace(pending, refined)
        found = remaining_error(part, changed, refined)
        good = (found.subspace <= min(subspace_tolerance, _SUBSPACE)) & (found.sigma <= _SIGMA)
        stalled = ~good & (found.subspace > _PROGRESS * error[pending])
        rounding = (found.subspace <= _STALLED_SUBSPACE) & (found.sigma <= _STALLED_SIGMA)
        settled[pending] = good | (stalled & rounding)
        error[pending], sigma[pending] = found.subspace, found.sigma
        pending = pending[~good & ~stalled]
    turned = torch.maximum(rotated(pair.left, reference.k), rotated(pair.right, reference.k))
    return Solution(pair, delta, block, settled, error, turned, sigma)


def is_perturbation(reference: ReferenceStack, change: Update, largest: float) -> Tensor:
    """(L,) whether an update is one that :func:`solve` may be asked about, which it does not look at itself.

    The update must be no larger than ``largest`` of the reference, Frobenius norms. And the k-th value must lie so far
    above what follows the guard band that its rotation is not damped: otherwise, as in a long run of equal values,
    neither the solve nor the estimates that rest on it know how far the leading vectors turn.
    """
    small = change.delta_frobenius <= largest * change.reference_frobenius
    s, k, w = reference.S, reference.k, leading_columns(reference)
    if w >= s.shape[-1]:
        return small
    last, beyond = s[..., k - 1], s[..., w]
    clear = (last - beyond) * (last + beyond) > FLOOR * last.square()
    return small & (clear | (change.delta_frobenius == 0))


def leading_columns(reference: ReferenceStack) -> int:
    """w: the k columns followed and a guard band past the cut.

    It ends where the smallest gap over the stack is largest; among multiples of `ALIGNED` where there is a choice of
    them, since gaps in a flat spectrum differ little.
    """
    k, s = reference.k, reference.S
    floor = s[..., :1] * max(reference.shape) * torch.finfo(torch.float32).eps
    rank = int((s > floor).sum(-1).min())  # columns of zero singular values have no direction to follow
    low, high = k + max(8, k // 4), k + max(12, k // 2)
    if high >= min(rank, round(0.85 * s.shape[-1])):
        return max(k, rank)
    drop = ((s[..., low - 1 : high] - s[..., low : high + 1]) / s[..., low - 1 : high]).amin(0).tolist()
    widths = [w for w in range(low, high + 1) if w % ALIGNED == 0]
    if len(widths) < _CHOICE:
        widths = list(range(low, high + 1))
    return max(widths, key=lambda w: drop[w - low])
