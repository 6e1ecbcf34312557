"""A low-rank change added to a weight and rounded: the last step of a restoration, without the change stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.backend import row_blocks
from rlspec.ops.add_rounded import ChangeSums, add_rounded, keys_of
from rlspec.ops.draws import Draws
from rlspec.ops.table import choose

# Entries of the change formed at once: enough rows for a product to run at full speed.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class LowRank:
    """The matrix ``left @ rightᵀ`` (m, n): left (m, c), right (n, c), float32 or float64 on one device."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        return self.left @ self.right.mT


def add_low_rank(
    tuned: Tensor, change: LowRank, strength: float, dtype: torch.dtype, *, draws: Draws | None = None
) -> tuple[Tensor, ChangeSums]:
    """``tuned + strength * change`` in ``dtype``, see :func:`rlspec.ops.add_rounded.add_rounded`.

    Args:
        tuned: (m, n), any floating dtype.
        change: of the same shape.

    Returns:
        (m, n) ``dtype``, and the sums over its entries.
    """
    m, n = tuned.shape
    shape = (1, m, n, change.left.shape[-1])
    if choose("add_low_rank", tuned.device, (tuned.dtype, change.left.dtype, dtype), shape) == "triton":
        from rlspec.kernels.add_low_rank import add_low_rank_triton

        weight, sums = add_low_rank_triton(
            tuned.unsqueeze(0),
            change.left.unsqueeze(0),
            change.right.unsqueeze(0),
            strength,
            dtype,
            keys=keys_of(draws),
        )
        return weight[0], ChangeSums.of(sums[0])
    weight = torch.empty(m, n, dtype=dtype, device=tuned.device)
    sums = ChangeSums()
    for block in row_blocks(m, n, _BLOCK):
        product = change.left[block] @ change.right.mT
        weight[block], part = add_rounded(
            tuned[block], product, strength, dtype, draws=draws, first=block.start
        )
        sums.add(part)
    return weight, sums
