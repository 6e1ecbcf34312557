"""What an engine measures against: reference factors of a stack of matrices, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rlspec.linalg.products import ALIGNED
from rlspec.perturb.matrix import MatrixBasis

_CHOICE = 4  # widths to choose a gap from


@dataclass(frozen=True)
class Reference:
    """Reference factors of L matrices of one shape, dtype and rank k, stacked for batched products, on one device.

    ``W`` (L, m, n) in the checkpoint's dtype; ``U`` (L, m, r), ``Vh`` (L, r, n) float64 or float32; ``S``
    (L, r) float64. A stack of one shares the memory of its :class:`MatrixBasis`. What depends on the factors alone
    is computed once and kept.
    """

    names: tuple[str, ...]
    W: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor
    k: int

    @classmethod
    def of(cls, matrices: Sequence[MatrixBasis]) -> Reference:
        return cls(
            names=tuple(m.name for m in matrices),
            W=stack([m.W for m in matrices]),
            U=stack([m.U for m in matrices]),
            S=stack([m.S for m in matrices]),
            Vh=stack([m.Vh for m in matrices]),
            k=matrices[0].k,
        )

    def select(self, index: Tensor) -> Reference:
        """The matrices of the given positions; all of them without a copy."""
        if index.numel() == self.S.shape[0]:
            return self
        names = tuple(self.names[i] for i in index.tolist())
        return Reference(names, self.W[index], self.U[index], self.S[index], self.Vh[index], self.k)

    def in_float32(self) -> Reference:
        """The same with U and Vh in float32."""
        return replace(self, U=self.U.float(), Vh=self.Vh.float())

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.W.shape[-2]), int(self.W.shape[-1])

    @cached_property
    def width(self) -> int:
        """w: the k columns followed and a guard band past the cut.

        It ends where the smallest gap over the stack is largest; among multiples of `ALIGNED` where there is a choice
        of them, since gaps in a flat spectrum differ little.
        """
        k, s = self.k, self.S
        floor = s[..., :1] * max(self.shape) * torch.finfo(torch.float32).eps
        rank = int((s > floor).sum(-1).min())  # columns of zero singular values have no direction to follow
        low, high = k + max(8, k // 4), k + max(12, k // 2)
        if high >= min(rank, round(0.85 * s.shape[-1])):
            return max(k, rank)
        drop = ((s[..., low - 1 : high] - s[..., low : high + 1]) / s[..., low - 1 : high]).amin(0).tolist()
        widths = [w for w in range(low, high + 1) if w % ALIGNED == 0]
        if len(widths) < _CHOICE:
            widths = list(range(low, high + 1))
        return max(widths, key=lambda w: drop[w - low])


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """(L, ...) from L tensors; a single one is only viewed, not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
