"""The complete thin SVD of a reference weight, by whichever route is fast and accurate at its size."""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.linalg.exact import exact_svd

# Up to this r = min(m, n) LAPACK in float64 takes well under a second, and the factors are kept in float64.
SMALL = 384
# The Gram route's factors are accepted when they reproduce the weight and are orthonormal to this accuracy.
_TOLERANCE = 1e-9


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
    wide = weight.double()
    if min(wide.shape) <= SMALL:
        return exact_svd(wide)
    factors = _by_gram(wide)
    if factors is None:
        factors = exact_svd(wide)
    u, s, vh = factors
    return u.float(), s, vh.float()


def _by_gram(a: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """SVD of float64 ``a`` from eigh of the smaller Gram matrix, or None where the conditioning forbids
    it."""
    if a.shape[0] < a.shape[1]:
        turned = _by_gram(a.mT)
        return None if turned is None else (turned[2].mT, turned[1], turned[0].mT)
    values, v = torch.linalg.eigh(a.mT @ a)
    s = values.flip(-1).clamp_min(0.0).sqrt()
    if float(s[-1]) <= 1e-5 * float(s[0]):  # the smallest left vectors would lose their orthogonality
        return None
    v = v.flip(-1)
    product = a @ v
    s = product.norm(dim=0)
    u = product / s
    # One Newton step for the polar factor: orthonormality d becomes 3/4 d².
    gram = u.mT @ u
    departure = gram - torch.eye(s.shape[0], dtype=a.dtype, device=a.device)
    if float(departure.abs().max()) > _TOLERANCE**0.5:
        return None
    u = u - 0.5 * u @ departure
    s, order = s.sort(descending=True)
    return u[:, order], s, v[:, order].mT
