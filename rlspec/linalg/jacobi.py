"""Singular value decompositions of small square matrices by one-sided Jacobi (Hestenes), many at once, on a device.

The columns of G = A V are rotated two by two until they are orthogonal: then G = U S, and A = U S Vᵀ. In a round of a
sweep the pairs are disjoint, and all of them turn at once: the tournament of Brent and Luk (SIAM J. Sci. Stat. Comput. 6,
1985), in which everybody meets everybody once.

For a symmetric A with all eigenvalues above zero U and V are the same, so V need not be kept: a symmetric matrix is
shifted there by whoever calls. A start, an orthogonal basis near V, is a first product, and by whoever calls, too.

Axes: ``b`` matrices of a batch, ``n`` rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

#: Sweeps after which it gives up: hard matrices take half as many.
MOST_SWEEPS = 30


class Rotated(NamedTuple):
    """What one-sided Jacobi made of ``G = A V`` whose columns were the rows of ``g``."""

    values: Tensor  #: (b, n), descending, not negative
    left: Tensor  #: (b, n, n); row i is left vector i
    right: Tensor | None  #: the same of V, where that was given
    status: Tensor  #: (b,) int32: 0 converged, 1 the sweeps were not enough, 2 not finite
    sweeps: Tensor  #: (b,) int32; the last one only looked


class Rotates(Protocol):
    """Who does it: the library of csrc/cuda, or the Triton kernel."""

    def rotate(self, g: Tensor, v: Tensor | None = None, *, most_sweeps: int = MOST_SWEEPS) -> Rotated:
        """Rotate columns until they are orthogonal; each matrix for itself, whatever its neighbours.

        Args:
            g: (b, n, n) float64 or float32; row i is column i of A V. Its squares must not overflow.
            v: (b, n, n) of its dtype; row i is column i of the orthogonal V, or None where V is not wanted.
            most_sweeps: see `MOST_SWEEPS`.
        """


class JacobiKernel:
    """kernels/triton/jacobi.py, for n up to 64; the host waits for nothing."""

    def rotate(self, g: Tensor, v: Tensor | None = None, *, most_sweeps: int = MOST_SWEEPS) -> Rotated:
        from rlspec.kernels.jacobi import jacobi_triton

        return Rotated(*jacobi_triton(g, v, most_sweeps=most_sweeps))
