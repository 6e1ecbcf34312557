"""The leading singular subspaces of W_ref + E from the reference's factors: first order, then sweeps where needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.perturb.batch import positions_of, take
from rlspec.perturb.coordinates import Pair, diagonalise
from rlspec.perturb.delta import Delta
from rlspec.perturb.estimate import remaining_error
from rlspec.perturb.first_order import first_order
from rlspec.perturb.reference import Reference
from rlspec.perturb.refine import refine
from rlspec.perturb.residual import Residual, residual

# Good enough for a spectrum of angles right to 1e-3 and values right to 1e-6, by the estimates of ``estimate``, which lie
# above the errors: what first order leaves over is random, and a third to a half of the estimate shows in the spectrum;
# what a sweep leaves over is not, and half of it shows in the spectrum whatever its direction.
_SPECTRUM, _SUBSPACE, _SIGMA = 1.4e-3, 2.1e-3, 5e-7
_SWEEPS = 6
_PROGRESS = 0.5  # a sweep that leaves more than this share of the error does not pay
# Where sweeps stop short of the tolerances, rounding has been reached, and not the end of the perturbative regime,
# as long as the error of the subspaces (a share of their rotation) and of the values is below this. A full
# decomposition in the accuracy of the factors would do no better.
_STALLED_SUBSPACE, _STALLED_SIGMA = 1e-2, 1e-6


@dataclass(frozen=True)
class Solution:
    """Leading subspaces of L matrices: the ``pair`` (w >= k columns) and how far it got.

    ``delta`` is E with products in the dtype of the factors, ``block`` is U1ᵀ E V1 (L, w, w) float64. On the host:
    ``settled`` (L,) bool says which are good enough, ``left_over`` what each pair leaves over; estimated errors, (L,)
    float64: ``subspace`` as a share of ``rotation``, the Frobenius norm of the sines; ``sigma`` relative. ``coarse``:
    whether the first order's factors were rounded.
    """

    pair: Pair
    delta: Delta
    block: Tensor
    settled: Tensor
    left_over: Residual
    subspace: Tensor
    sigma: Tensor
    coarse: bool = False

    @property
    def rotation(self) -> Tensor:
        return torch.maximum(self.left_over.rotated_left, self.left_over.rotated_right)

    def select(self, positions: Sequence[int]) -> Solution:
        """The matrices of the given positions; all of them without a copy."""
        return Solution(
            self.pair.select(positions),
            self.delta.select(positions),
            take(self.block, positions),
            take(self.settled, positions),
            self.left_over.select(positions),
            take(self.subspace, positions),
            take(self.sigma, positions),
            self.coarse,
        )


def solve(
    reference: Reference, delta: Delta, *, subspace_tolerance: float = 1.0, coarse: bool = False
) -> Solution:
    """The leading subspaces of W_ref + E, where :func:`is_perturbation`.

    On a device the host waits twice, for the cores and for what decides, and as often again in each sweep.

    Args:
        subspace_tolerance: error of the subspaces to reach, as a share of their rotation, Frobenius norms. Angles
            need no more than what is asked for anyway; a restored weight is as wrong as the subspaces are.
        coarse: take the first order from factors rounded to bfloat16, see :func:`first_order`. What that leaves over is
            measured without rounding, as ever, and refined where it is too much.
    """
    delta = delta.to(reference.U.dtype)
    left, right, core, grams, block = first_order(reference, delta, coarse=coarse)
    pair = diagonalise(left, right, core, grams, coarse=coarse)
    left_over = residual(reference, delta, pair)
    found = remaining_error(reference.sample, left_over)
    settled = (found.spectrum <= _SPECTRUM) & (found.subspace <= subspace_tolerance) & (found.sigma <= _SIGMA)
    settled |= delta.stats.delta_frobenius == 0
    # A pair without a core is beyond repair, see ``diagonalise``.
    error, sigma, pending = found.subspace, found.sigma, positions_of(~settled & _has_core(left_over))
    for _ in range(_SWEEPS):
        if not pending:
            break
        part, changed = reference.select(pending), delta.select(pending)
        refined = refine(part, changed, pair.select(pending))
        remains = residual(part, changed, refined)
        found = remaining_error(reference.sample, remains)
        pair, left_over = pair.replace(pending, refined), left_over.replace(pending, remains)
        good = (found.subspace <= min(subspace_tolerance, _SUBSPACE)) & (found.sigma <= _SIGMA)
        stalled = ~good & ((found.subspace > _PROGRESS * error[pending]) | ~_has_core(remains))
        rounding = (found.subspace <= _STALLED_SUBSPACE) & (found.sigma <= _STALLED_SIGMA)
        settled[pending] = good | (stalled & rounding)
        error[pending], sigma[pending] = found.subspace, found.sigma
        pending = [pending[i] for i in positions_of(~good & ~stalled)]
    return Solution(pair, delta, block, settled, left_over, error, sigma, coarse)


def _has_core(left_over: Residual) -> Tensor:
    """(L,) bool, on the host."""
    return left_over.sigma.isfinite().all(-1)


def is_perturbation(reference: Reference, delta: Delta, largest: float) -> Tensor:
    """(L,) on the host: whether an update is one that :func:`solve` may be asked about, which it does not look at itself.

    The update must be no larger than ``largest`` of the reference, Frobenius norms. And the k-th value must lie so far
    above what follows the guard band that its rotation is not damped: otherwise, as in a long run of equal values,
    neither the solve nor the estimates that rest on it know how far the leading vectors turn.
    """
    stats = delta.stats
    small = stats.delta_frobenius <= largest * stats.reference_frobenius
    return small & (reference.clear | (stats.delta_frobenius == 0))
