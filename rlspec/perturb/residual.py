"""What a candidate pair leaves over, on a few combinations of its columns: the raw material of estimates and bounds.

For an orthonormal pair with core diag(σ), the residuals ``W x_j - σ_j y_j`` and ``Wᵀ y_j - σ_j x_j`` hold
everything that is missing. Their part inside the candidate's own span is the error of the core, their part
outside is what would still turn the subspace. Both are measured, not modelled: the products that give them
are taken afresh, so the rounding of the fast products shows up in them too.

A few combinations suffice, all taken in one product: single columns where trouble sits (next to the cut, where the gap
is smallest, and at the top, where the values are largest), neighbours with random signs between, and random signs over
all k, which give the norm of the whole from a sample of its range. All that decisions need of them reaches the host in
one transfer.

Axes: ``L`` matrices, ``w`` columns of the pair, ``c`` combinations of them, ``e`` of those that estimates look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlspec.linalg.transfer import to_host
from rlspec.ops.sylvester_rotation import sylvester_rotation
from rlspec.perturb.batch import put
from rlspec.perturb.coordinates import Pair, Side, apply
from rlspec.perturb.delta import Delta, frobenius, norm_of_rows, row_norms
from rlspec.perturb.reference import FLOOR, Reference


@dataclass(frozen=True)
class Residual:
    """Of L pairs, on the host, float64. "Turn" is the correction that the next sweep would make to a column.

    ``core_left``, ``core_right``: Yᵀ and Xᵀ times the residuals, (L, w, c), the error of the core. ``outside``:
    (L, c, c), Gram matrix of what of both residuals lies outside the spans. The others are of the e estimated
    combinations: ``turn_left``, ``turn_right`` (L, e) squared norms of the turns, solved with the smallest of their
    values; ``second`` (L, e) residual times turn; ``spread_left``, ``spread_right`` Gram matrices (L, s, s) of what all
    but those at the cut have outside the reference's leading k. ``rotated_left``, ``rotated_right`` (L,): see
    :func:`rotated`. ``sigma`` (L, w).
    """

    sigma: Tensor
    core_left: Tensor
    core_right: Tensor
    outside: Tensor
    turn_left: Tensor
    turn_right: Tensor
    second: Tensor
    spread_left: Tensor
    spread_right: Tensor
    rotated_left: Tensor
    rotated_right: Tensor

    def replace(self, positions: Sequence[int], other: Residual) -> Residual:
        """A copy with the given matrices taken from another."""
        return Residual(
            *(put(getattr(self, f.name), positions, getattr(other, f.name)) for f in fields(self))
        )

    def select(self, positions: Sequence[int]) -> Residual:
        return Residual(*(getattr(self, f.name)[list(positions)] for f in fields(self)))


def residual(reference: Reference, delta: Delta, pair: Pair) -> Residual:
    """Measure what a pair leaves over.

    Args:
        delta: E, with products in the dtype of the factors.
        pair: w >= k columns with their core diagonal.
    """
    sample, w = reference.sample, pair.sigma.shape[-1]
    combinations = reference.combinations.expand(pair.sigma.shape[0], -1, -1)
    c = combinations.shape[-1]
    # ω and σ ω in one product.
    mix = torch.cat([combinations, pair.sigma.unsqueeze(-1) * combinations], dim=-1)
    narrow = mix.to(pair.left.tail.dtype)
    left, right = pair.left.times(mix, narrow), pair.right.times(mix, narrow)
    over_left = apply(reference, delta, right.columns(0, c)) - left.columns(c, 2 * c)
    over_right = apply(reference, delta, left.columns(0, c), transpose=True) - right.columns(c, 2 * c)
    core_left, core_right = pair.left.dot(over_left), pair.right.dot(over_right)
    outside = [over_left - pair.left @ core_left, over_right - pair.right @ core_right]
    rows = torch.cat([*outside[0].parts(), *outside[1].parts()], dim=-2).double()
    few = sample.estimated
    some_left, some_right = over_left.columns(few.start, few.stop), over_right.columns(few.start, few.stop)
    sigma = pair.sigma.index_select(-1, reference.last_columns)
    tails = some_left.tail, some_right.tail
    turn_right, turn_left = sylvester_rotation(reference.S[..., w:], sigma, *tails, floor=FLOOR)
    turns = torch.stack([turn_left, turn_right])
    square_left, square_right = turns.double().square().sum(-2)
    second_left, second_right = (torch.stack(tails) * turns).sum(-2)
    k, s = reference.k, sample.top + sample.groups
    spread = [side.columns(0, s).rows(k, s).double() for side in (left, right)]
    found = to_host(
        [
            pair.sigma,
            core_left,
            core_right,
            rows.mT @ rows,
            _with_outside(square_left, some_left, sigma),
            _with_outside(square_right, some_right, sigma),
            (second_left + second_right).double(),
            *(t.mT @ t for t in spread),
            *(row_norms(side.rows(k, k)) for side in (pair.left, pair.right)),
        ]
    )
    rounding = torch.finfo(pair.left.tail.dtype).eps
    return Residual(*found[:-2], *(norm_of_rows(norms).clamp_min(rounding) for norms in found[-2:]))


def rotated(side: Side, k: int) -> Tensor:
    """(L,) Frobenius norm of the sines of the first k columns; at least the dtype's rounding."""
    return frobenius(side.rows(k, k)).clamp_min(torch.finfo(side.tail.dtype).eps)


def _with_outside(square: Tensor, over: Side, sigma: Tensor) -> Tensor:
    """(L, e) squared norms of the corrections of columns: of their turns, ``square``, and of what they have outside the
    factors' range."""
    if over.outside is None:
        return square
    return square + (over.outside.double() / sigma.unsqueeze(-2)).square().sum(-2)
