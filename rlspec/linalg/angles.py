"""Principal angles between subspaces, accurate for small angles.

Cosines of small angles are useless: in float32 ``arccos`` resolves nothing under about 3.5e-4 rad, and float64
nothing under 1.5e-8. The sine form of Björck and Golub (Math. Comp. 27, 1973) takes the singular values of
``B - A AᵀB``, which are the sines themselves; above pi/4 the cosine is the accurate one (Knyazev and Argentati,
SIAM J. Sci. Comput. 23, 2002), so each angle comes from whichever is the smaller of the two.

Axes: ``n`` ambient dimension, ``p`` and ``q`` columns of the two bases, ``k = min(p, q)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlspec.errors import TensorError
from rlspec.linalg.dense import lapack_values

# Above this departure from orthonormality the columns are not a rounded orthonormal basis, they are something else.
# A basis rounded to bfloat16 departs by about 1e-2.
_MAX_DEPARTURE = 0.1


def principal_sines(a: Tensor, b: Tensor) -> Tensor:
    """Sines of the principal angles between the column spaces of ``a`` and ``b``.

    Args:
        a: orthonormal columns, shape (..., n, p), any floating dtype.
        b: orthonormal columns, shape (..., n, q), same leading dimensions.

    Returns:
        Sines, shape (..., k) with k = min(p, q), float64, descending (the largest angle first).

    Raises:
        TensorError: shapes do not fit, an entry is not finite, or the columns are not orthonormal.
    """
    sines, cosines = _sines_and_cosines(a, b)
    from_cosine = (1.0 - cosines.square()).clamp_min(0.0).sqrt()
    return torch.where(cosines < math.sqrt(0.5), from_cosine, sines)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles in radians between the column spaces of ``a`` and ``b``.

    Arguments, shape, order and errors are those of :func:`principal_sines`; values lie in [0, pi/2].
    """
    sines, cosines = _sines_and_cosines(a, b)
    return torch.where(cosines < math.sqrt(0.5), torch.arccos(cosines), torch.arcsin(sines))


def _sines_and_cosines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sines (descending) and cosines (ascending) of the same angles, each (..., k) float64 in [0, 1]."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[:-1] != b.shape[:-1]:
        raise TensorError(
            f"principal angles need two bases of one space, found shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.shape[-1] < b.shape[-1]:  # the sines of span(b) against span(a) need span(b) to be the smaller one
        a, b = b, a
    a, b = _polish(a), _polish(b)
    cross = a.mT @ b
    sines = lapack_values(b - a @ cross).clamp(0.0, 1.0)
    cosines = lapack_values(cross).flip(-1).clamp(0.0, 1.0)
    return sines, cosines


def _polish(basis: Tensor) -> Tensor:
    """The nearest orthonormal basis in float64, by Newton's iteration for the polar factor.

    Columns rounded to float32 are orthonormal to 1e-7 only, and ``b - a aᵀb`` would show that as an angle.
    """
    basis = basis.to(torch.float64)
    n, k = basis.shape[-2:]
    if k > n:
        raise TensorError(f"{k} columns cannot be orthonormal in dimension {n}")
    if basis.numel() == 0:
        return basis
    eye = torch.eye(k, dtype=basis.dtype, device=basis.device)
    for attempt in range(4):
        gram = basis.mT @ basis
        departure = float((gram - eye).abs().amax())
        if not departure < (_MAX_DEPARTURE if attempt == 0 else 1.0):  # also catches NaN
            raise TensorError(f"columns are not orthonormal: |AᵀA - I| is {departure:.2g} at its largest")
        if departure < 1e-13:
            break
        # A quadratic step: the departure d becomes about 3/4 d².
        basis = basis @ (1.5 * eye - 0.5 * gram)
    return basis
