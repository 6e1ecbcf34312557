"""Full (thin) singular value decompositions through LAPACK.

Axes: ``m`` rows, ``n`` columns, ``r = min(m, n)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.linalg.orth import gram


def exact_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD ``a = U diag(S) Vh`` of every matrix of a batch, in the precision of its dtype.

    LAPACK's divide and conquer (``gesdd``) does the work. It is known to fail on rare matrices; those are
    decomposed again from their Gram matrix in float64, so that the call never fails for want of convergence.

    Args:
        a: shape (..., m, n), finite. float64 is computed in float64, every narrower dtype in float32.

    Returns:
        U (..., m, r), S (..., r) descending, Vh (..., r, n), all float64 or all float32.
    """
    a = a if a.dtype == torch.float64 else a.to(torch.float32)
    try:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
    except torch.linalg.LinAlgError:
        return svd_by_gram(a)
    return u, s, vh


def svd_by_gram(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD from the eigenvectors of the smaller Gram matrix in float64, for when ``gesdd`` gives up.

    Arguments and results are those of :func:`exact_svd`. Singular values are right to 1e-8 of the largest (the
    square root of float64's precision); U and V are orthonormal to rounding whatever the rank.
    """
    if a.shape[-2] < a.shape[-1]:
        u, s, vh = svd_by_gram(a.mT)
        return vh.mT.contiguous(), s, u.mT.contiguous()
    # Scaling by the largest entry keeps the Gram matrix clear of overflow and underflow.
    scale = a.abs().amax(dim=(-2, -1), keepdim=True).to(torch.float64)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    wide = a.to(torch.float64) / scale
    v = torch.linalg.eigh(wide.mT @ wide).eigenvectors.flip(-1)
    # a v is orthogonal up to rounding; a QR factorisation makes that exact, zero columns included.
    u, upper = torch.linalg.qr(wide @ v)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    s, order = diagonal.abs().sort(dim=-1, descending=True)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(diagonal.dtype)
    u = torch.take_along_dim(u * sign.unsqueeze(-2), order.unsqueeze(-2), dim=-1)
    v = torch.take_along_dim(v, order.unsqueeze(-2), dim=-1)
    return u.to(a.dtype), (s * scale.squeeze(-1)).to(a.dtype), v.mT.to(a.dtype)


def leading_by_gram(a: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leading k triplets of float32 data from the float64 eigenvectors of the smaller Gram matrix.

    Squaring costs nothing here: float64 has twice float32's digits. Wanted vectors come out more accurate than from
    a float32 ``gesdd``, and faster, above all for matrices far from square.

    Args:
        a: (b, m, n) with m >= n, float32.
        k: 1 <= k <= n.

    Returns:
        u (b, m, k), s (b, n) all singular values, v (b, n, k), float64, and whether each result may be used (b,):
        False where sigma_k is too small beside sigma_1 for its square to be resolved.
    """
    wide = a.to(torch.float64)
    values, vectors = torch.linalg.eigh(gram(wide))
    s = values.flip(-1).clamp_min(0).sqrt()
    v = vectors.flip(-1)[..., :k]
    image = wide @ v
    lengths = image.norm(dim=-2)
    s[..., :k] = lengths
    usable = lengths[..., k - 1] > 1e-4 * lengths[..., 0]
    return image / lengths.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-2), s, v, usable
