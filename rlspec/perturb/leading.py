"""Whether a pair of invariant subspaces is the leading one.

What a pair leaves over proves that it is invariant, not that it leads: an update that hardly couples the leading
directions to the others may lift one of the others past them. Weights whose singular values alone were tuned are such,
and adapters that add a direction of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.perturb.batch import positions_of
from rlspec.perturb.coordinates import Pair
from rlspec.perturb.delta import Delta
from rlspec.perturb.norms import estimated_norm, norm_outside
from rlspec.perturb.reference import Reference

# Norms are estimated from below: by how much they may be larger.
_SLACK_UPDATE, _SLACK_OUTSIDE = 1.05, 1.01


def largest_outside(
    reference: Reference, delta: Delta, pair: Pair, sigma: Tensor, norm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the largest singular value outside of each pair may be, where it could come near the k-th inside.

    By Weyl's inequality it is at most that of the reference there and ||E||_2 on top. Where that stays below the k-th
    value, as it mostly does, no more is computed.

    Args:
        delta: E, with products in the dtype of the factors.
        sigma: of the pair, (L, w) on the host.
        norm: ||E||_2, (L,) on the host, where it is known.

    Returns:
        On the host: the value, (L,) float64, 0 where Weyl's inequality keeps it away; and (L,) bool, whether it reaches
        the k-th one, so that the pair's first k are not known to lead.
    """
    values, last = reference.values, sigma[..., reference.k - 1]
    w = sigma.shape[-1]
    found = torch.zeros_like(last)
    if w >= values.shape[-1]:  # nothing is left outside
        return found, torch.zeros_like(found, dtype=torch.bool)
    room = (last - values[..., w]) / _SLACK_UPDATE
    near = positions_of(~(delta.stats.delta_frobenius < room))
    if near and norm is None:
        norm = torch.zeros_like(last)
        norm[near] = estimated_norm(delta.select(near))
    near = [i for i in near if norm is not None and not norm[i] < room[i]]
    if near:
        part = reference.select(near)
        found[near] = _SLACK_OUTSIDE * norm_outside(part, delta.select(near), pair.select(near))
    return found, ~(found < last)
