"""Orthonormalisation out of matrix products.

Axes: ``m`` rows, ``n`` columns, leading dimensions are a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.linalg.dense import householder
from rlspec.linalg.products import gram

# The departure from orthonormal, entry by entry, that a second pass squares.
_SQUARED = 0.1


def well_conditioned(y: Tensor) -> Tensor:
    """A basis of the columns of ``y`` that is nearly orthonormal: one pass of shifted CholeskyQR.

    The shift (Fukaya et al., SIAM J. Sci. Comput. 42, 2020) lets the factorisation succeed where the Gram matrix is
    singular to working precision, at the price of leaving condition numbers of a few hundred, which a generalised
    Rayleigh-Ritz step that knows the Gram matrix does not mind.

    Args:
        y: shape (..., n, l), columns of similar length.
    """
    moments = gram(y).to(torch.float64)
    shift = 1e-5 if y.dtype == torch.float32 else 1e-13
    upper = _shifted_cholesky(moments, shift)
    return torch.linalg.solve_triangular(upper.to(y.dtype), y, upper=True, left=False)


def orthonormal(y: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``y`` (..., n, l): CholeskyQR twice, Householder where that fails."""
    moments = gram(y).to(torch.float64)
    upper, info = torch.linalg.cholesky_ex(moments, upper=True)
    if bool((info == 0).all()):
        q = torch.linalg.solve_triangular(upper.to(y.dtype), y, upper=True, left=False)
        moments = gram(q).to(torch.float64)
        eye = torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)
        # The second pass squares the departure, provided that the first one got anywhere.
        if bool(((moments - eye).abs().amax(dim=(-2, -1)) < _SQUARED).all()):
            upper = torch.linalg.cholesky(moments, upper=True)
            return torch.linalg.solve_triangular(upper.to(y.dtype), q, upper=True, left=False)
    return householder(y)[0]


def _shifted_cholesky(moments: Tensor, shift: float) -> Tensor:
    """Upper Cholesky factor of ``moments + shift·max(diag)·I``, the shift raised until it succeeds."""
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    scale = moments.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    while True:
        upper, info = torch.linalg.cholesky_ex(moments + shift * scale * eye, upper=True)
        if bool((info == 0).all()) or shift > 1:
            return upper
        shift *= 100
