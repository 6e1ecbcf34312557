"""What LoRA adapters add to one matrix, as factors: the product is never formed unless somebody asks for the sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.backend import where_computed
from rlspec.io.projections import Projection


@dataclass(frozen=True)
class Update:
    """``left @ right`` on a matrix (m, n): left (m, q), right (q, n), float64; q = 0 where nothing is added.

    float64 holds scale B without another rounding, whatever the adapter's dtype is; the factors are small.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, terms: Sequence[tuple[Tensor, Tensor, float]]) -> Update:
        """The sum of ``scale * left @ right`` over one or more terms (left, right, scale)."""
        lefts = [where_computed(left).double() * scale for left, _, scale in terms]
        rights = [where_computed(right).double() for _, right, _ in terms]
        return cls(torch.cat(lefts, dim=1), torch.cat(rights, dim=0))

    @classmethod
    def none(cls, weight: Tensor) -> Update:
        """Nothing, on a matrix of this shape and device."""
        m, n = weight.shape
        left, right = (
            torch.empty(shape, dtype=torch.float64, device=weight.device) for shape in ((m, 0), (0, n))
        )
        return cls(left, right)

    def to(self, device: torch.device) -> Update:
        return Update(self.left.to(device), self.right.to(device))

    def part(self, projection: Projection) -> Update:
        """Of a projection's matrix, where this is the update of the tensor that holds it."""
        left, right = (self.right.mT, self.left.mT) if projection.transposed else (self.left, self.right)
        return Update(projection.rows_of(left), projection.columns_of(right))

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight`` (m, n) with the update, float32 or wider; itself where that is nothing."""
        if self.left.shape[1] == 0:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.addmm(weight.to(wide), self.left.to(wide), self.right.to(wide))
