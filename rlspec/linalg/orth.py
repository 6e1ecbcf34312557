"""Orthonormalisation out of matrix products.

Axes: ``m`` rows, ``n`` columns, leading dimensions are a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlspec.linalg.dense import householder
from rlspec.ops.gram import gram

# The largest departure from orthonormal, entry by entry, of what a first pass got anywhere with.
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
    """An orthonormal basis of the columns of each ``y`` (..., n, l): CholeskyQR twice, Householder where that fails."""
    q, good = _cholesky_qr(y)
    q, again = _cholesky_qr(q, most=_SQUARED)
    good = good & again
    if not bool(good.all()):
        q[~good] = householder(y[~good])[0]
    return q


def _cholesky_qr(y: Tensor, most: float = math.inf) -> tuple[Tensor, Tensor]:
    """``y R⁻¹`` with RᵀR = yᵀy, and where that worked (...): the factor exists, and yᵀy departs from the identity by less
    than ``most``."""
    moments = gram(y).to(torch.float64)
    upper, info = torch.linalg.cholesky_ex(moments, upper=True)
    q = torch.linalg.solve_triangular(upper.to(y.dtype), y, upper=True, left=False)
    eye = torch.eye(y.shape[-1], dtype=torch.float64, device=y.device)
    return q, (info == 0) & ((moments - eye).abs().amax(dim=(-2, -1)) < most)


def _shifted_cholesky(moments: Tensor, shift: float) -> Tensor:
    """Upper Cholesky factor of ``moments + shift·max(diag)·I``, each matrix's shift raised until it succeeds."""
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    scale = moments.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    shifts = torch.full_like(scale, shift)
    while True:
        upper, info = torch.linalg.cholesky_ex(moments + shifts * scale * eye, upper=True)
        failed = (info != 0)[..., None, None]
        if shift > 1 or not bool(failed.any()):
            return upper
        shift *= 100
        shifts = torch.where(failed, shifts * 100, shifts)
