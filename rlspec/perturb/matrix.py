"""The reference decomposition of one weight matrix, complete: leading part, trailing part, gap at the cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlspec.linalg.rank import Rank


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
    def numerical_rank(self) -> int:
        """Singular values that are more than rounding noise of the stored weight."""
        if self.S.numel() == 0:
            return 0
        wide = self.U.dtype == torch.float64 and self.W.dtype == torch.float64
        floor = self.S[0] * max(self.W.shape) * torch.finfo(torch.float64 if wide else torch.float32).eps
        return int(self.S.gt(floor).sum())

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
    whole = MatrixBasis(name, weight, u, s, vh, wanted)
    numerical = whole.numerical_rank
    if numerical >= wanted:
        return whole
    note = f"numerical rank {numerical} is below the requested {wanted}; the leading {numerical} are followed"
    return replace(whole, k=numerical, note=note)
