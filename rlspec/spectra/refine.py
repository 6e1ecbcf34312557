"""One sweep of block refinement: residuals, Sylvester correction, Rayleigh-Ritz."""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.spectra.bounds import Bounds, probe_bounds
from rlspec.spectra.measurement import ReferenceStack
from rlspec.spectra.subspace import Pair, Side, apply, diagonalise
from rlspec.spectra.sylvester import rotation


def refine(reference: ReferenceStack, delta: Tensor, pair: Pair) -> tuple[Pair, Bounds]:
    """Improve a pair by one Davidson-like sweep.

    The residual of every column, taken in reference coordinates, passes through the same elementwise solve
    that gave the first-order rotation (a preconditioner that is exact up to E), and the core is formed anew
    between the corrected bases.

    Args:
        delta: E, (L, m, n), in the dtype of the factors.
        pair: w columns with their core diagonal.
    """
    w = pair.sigma.shape[-1]
    eye = torch.eye(w, dtype=torch.float64, device=delta.device)
    scaled = eye * pair.sigma.unsqueeze(-2)
    residual_left = apply(reference, delta, pair.right) - pair.left @ scaled
    residual_right = apply(reference, delta, pair.left, transpose=True) - pair.right @ scaled
    turn_right, turn_left = rotation(
        reference.S[..., w:], pair.sigma, residual_left.tail, residual_right.tail
    )
    inverse = (1.0 / pair.sigma).unsqueeze(-2)
    left = _corrected(pair.left, turn_left, residual_left.outside, inverse)
    right = _corrected(pair.right, turn_right, residual_right.outside, inverse)
    core = left.dot(apply(reference, delta, right))
    refined = diagonalise(left, right, core)
    return refined, probe_bounds(reference, delta, refined)


def _corrected(side: Side, turn: Tensor, residual_outside: Tensor | None, inverse: Tensor) -> Side:
    """Add the correction in the tail coordinates and outside; the leading coordinates follow by
    orthonormality."""
    if side.outside is None or residual_outside is None:
        return Side(side.lead, side.tail + turn, side.outside)
    return Side(side.lead, side.tail + turn, side.outside + residual_outside * inverse.to(turn.dtype))
