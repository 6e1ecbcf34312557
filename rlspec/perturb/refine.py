"""One sweep of block refinement: residuals, Sylvester correction, Rayleigh-Ritz."""

from __future__ import annotations

from torch import Tensor

from rlspec.ops.sylvester_rotation import sylvester_rotation
from rlspec.perturb.coordinates import Pair, Side, apply, diagonalise, scale
from rlspec.perturb.delta import Delta
from rlspec.perturb.reference import FLOOR, Reference


def refine(reference: Reference, delta: Delta, pair: Pair) -> Pair:
    """Improve a pair by one Davidson-like sweep.

    The residual of every column, taken in reference coordinates, passes through the same elementwise solve
    that gave the first-order rotation (a preconditioner that is exact up to E), and the core is formed anew
    between the corrected bases.

    Args:
        delta: E, with products in the dtype of the factors.
        pair: w columns with their core diagonal.
    """
    image, adjoint = apply(reference, delta, pair.right), apply(reference, delta, pair.left, transpose=True)
    residual_left, residual_right = (
        image - scale(pair.left, pair.sigma),
        adjoint - scale(pair.right, pair.sigma),
    )
    w = pair.sigma.shape[-1]
    turn_right, turn_left = sylvester_rotation(
        reference.S[..., w:], pair.sigma, residual_left.tail, residual_right.tail, floor=FLOOR
    )
    left = _corrected(pair.left, turn_left, residual_left.outside, pair.sigma)
    right = _corrected(pair.right, turn_right, residual_right.outside, pair.sigma)
    return diagonalise(left, right, _core(reference, pair, (left, right), (image, adjoint)))


def _core(
    reference: Reference, pair: Pair, corrected: tuple[Side, Side], images: tuple[Side, Side]
) -> Tensor:
    """(L, w, w) float64 ``(Y + dY)ᵀ W (X + dX)`` from W X and Wᵀ Y, which are at hand.

    Only dYᵀ E dX is left out: E once more, between two corrections. It is of third order where the sweep
    itself is of second, and the bounds that are taken afterwards see it.
    """
    w = pair.sigma.shape[-1]
    left, right = corrected[0] - pair.left, corrected[1] - pair.right
    image, adjoint = images
    core = pair.left.dot(image) + adjoint.rest_dot(right) + left.rest_dot(image)
    return core + (left.tail.mT * reference.narrow[..., None, w:]) @ right.tail


def _corrected(side: Side, turn: Tensor, residual_outside: Tensor | None, sigma: Tensor) -> Side:
    """Add the correction in the tail coordinates and outside; the leading coordinates follow by
    orthonormality."""
    if side.outside is None or residual_outside is None:
        return Side(side.lead, side.tail + turn, side.outside)
    inverse = sigma.reciprocal().to(turn.dtype).unsqueeze(-2)
    return Side(side.lead, side.tail + turn, side.outside + residual_outside * inverse)
