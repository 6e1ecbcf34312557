"""The complete thin SVD of a reference weight, by whichever route is fast and accurate at its size."""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.linalg.exact import exact_svd
from rlspec.linalg.orth import gram

# Up to this r = min(m, n) LAPACK in float64 takes well under a second, and the factors are kept in float64.
SMALL = 384
# How far left vectors from the Gram matrix may be from orthonormal: nothing to float32, and rounding to float64.
_FLOAT32, _FLOAT64 = 1e-8, 1e-14
# The largest departure that one Newton step mends.
_MENDABLE = 3e-5


def reference_factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of one matrix, computed in float64.

    Small matrices go to LAPACK. Larger ones are decomposed through the eigenvectors of the smaller Gram
    matrix in float64 (several times faster): its errors are those of float64 times (sigma_1/sigma_i)², far
    below float32's as long as the matrix is well conditioned. That is checked afterwards, and LAPACK does
    it again where it is not.

    Args:
        weight: (m, n), any floating dtype, finite.

    Returns:
        U (m, r), S (r,) float64 descending, Vh (r, n). U and Vh are float64 up to r = ``SMALL``, else
        float32.
    """
    if min(weight.shape) <= SMALL:
        return exact_svd(weight.double())
    u, s, vh = full_svd(weight.double(), orthonormal=_FLOAT32)
    return u.float(), s, vh.float()


def full_svd(a: Tensor, *, orthonormal: float = _FLOAT64) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of one finite float64 matrix (m, n): U (m, r), S (r,) descending, Vh (r, n), float64.

    By the Gram matrix where the size makes that pay and the conditioning allows it, else by LAPACK's SVD.

    Args:
        orthonormal: departure of UᵀU from the identity that is good enough.
    """
    factors = _by_gram(a, orthonormal) if min(a.shape) > SMALL else None
    return factors if factors is not None else exact_svd(a)


def _by_gram(a: Tensor, orthonormal: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """SVD of float64 ``a`` from eigh of the smaller Gram matrix, or None where the conditioning forbids it."""
    if a.shape[0] < a.shape[1]:
        turned = _by_gram(a.mT, orthonormal)
        return None if turned is None else (turned[2].mT, turned[1], turned[0].mT)
    values, v = torch.linalg.eigh(gram(a))
    s = values.flip(-1).clamp_min(0.0).sqrt()
    if float(s[-1]) <= 1e-5 * float(s[0]):  # the smallest left vectors would lose their orthogonality
        return None
    v = v.flip(-1)
    product = a @ v
    s = product.norm(dim=0)
    u = product / s
    expected = torch.finfo(a.dtype).eps * (float(s[0]) / float(s[-1])) ** 2
    if expected > orthonormal:
        # One Newton step for the polar factor: departure d becomes 3/4 d².
        departure = gram(u)
        departure.diagonal().sub_(1.0)
        if float(departure.abs().max()) > _MENDABLE:
            return None
        u = u - 0.5 * u @ departure
    if bool((s[1:] <= s[:-1]).all()):
        return u, s, v.mT
    s, order = s.sort(descending=True)
    return u[:, order], s, v[:, order].mT
