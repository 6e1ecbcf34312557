"""The reference decomposition of one weight matrix, complete: leading part, trailing part, gap at the cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.spectra.rank import Rank


@dataclass(frozen=True)
class MatrixBasis:
    """Full thin SVD of a reference weight ``W = U diag(S) Vh``, shape (m, n), r = min(m, n).

    ``W`` keeps the dtype of the checkpoint. ``U`` (m, r) and ``Vh`` (r, n) are float64 or float32, ``S``
    (r,) is float64. ``k`` is the tracked rank: what the rank rule asked for, or the numerical rank where
    that is smaller (directions of zero singular values are arbitrary), which ``note`` then says.
    """

    name: str
    W: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor
    k: int
    note: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.W.shape[0]), int(self.W.shape[1])

    @property
    def frobenius(self) -> float:
        """Frobenius norm of the reference weight."""
        return float(self.S.square().sum().sqrt())

    @property
    def gap_at_cut_rel(self) -> float | None:
        """(sigma_k - sigma_{k+1}) / sigma_k; ``None`` where nothing is cut off or nothing is there."""
        if self.k == 0 or self.k >= self.S.shape[0]:
            return None
        return float((self.S[self.k - 1] - self.S[self.k]) / self.S[self.k - 1])


def matrix_basis(
    name: str, weight: Tensor, factors: tuple[Tensor, Tensor, Tensor], rank: Rank
) -> MatrixBasis:
    """Join a weight and its thin SVD ``(U, S, Vh)`` under a rank rule."""
    u, s, vh = factors
    s = s.double()
    wanted = rank.resolve(s)
    # Rounding noise of the factorisation: below this a value is zero as far as the stored dtype can tell.
    eps = torch.finfo(
        u.dtype if u.dtype == torch.float64 and weight.dtype == torch.float64 else torch.float32
    ).eps
    numerical = int((s > s[0] * max(weight.shape) * eps).sum()) if float(s[0]) > 0.0 else 0
    note = None
    if numerical < wanted:
        note = (
            f"numerical rank {numerical} is below the requested {wanted}; "
            f"the leading {numerical} are followed"
        )
    return MatrixBasis(name, weight, u, s, vh, min(wanted, numerical), note)
