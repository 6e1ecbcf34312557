"""The complete thin SVD of a reference weight, by whichever route is fast and accurate at its size."""

from __future__ import annotations

from torch import Tensor

from rlspec.linalg.dense import FLOAT32, SMALL, thin_svd


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
    u, s, vh = thin_svd(weight.double(), orthonormal=FLOAT32)
    return (u, s, vh) if min(weight.shape) <= SMALL else (u.float(), s, vh.float())
