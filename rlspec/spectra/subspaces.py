"""The leading subspaces of a stack of weights, kept to be compared with those of other weights: subspace locking.

They are held in coordinates of the reference, as the engines find them. Vectors would carry the rounding of the
reference's factors, which is more than what subspaces near to each other differ by; coordinates of two weights do not.

Axes: ``L`` matrices, ``k`` columns; see :class:`rlspec.perturb.coordinates.Side`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlspec.linalg.transfer import to_host
from rlspec.perturb.coordinates import Side
from rlspec.perturb.reference import Reference

# What sums of products near one are rounded by, generously.
_ROUNDING = 64.0 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Subspaces:
    """The leading k left and right singular subspaces of L weights, on the device of their reference.

    ``left``, ``right``: nearly orthonormal bases of k columns; None where k is the whole of that side. ``error`` (L,)
    float64, on the host: the angle within which each lies of the true one, radians.
    """

    left: Side | None
    right: Side | None
    error: Tensor

    @classmethod
    def of(cls, reference: Reference, left: Side, right: Side, same: Tensor, error: Tensor) -> Subspaces:
        """Copies of the leading k columns of two bases.

        Args:
            left, right: k columns or more.
            same: (L,) bool, on the host: which weights are the reference; those have its subspaces to the bit.
            error: see the class.
        """
        m, n = reference.shape
        k = reference.k
        kept = [_leading(side, k, same) if k < dim else None for side, dim in ((left, m), (right, n))]
        return cls(kept[0], kept[1], error)

    @classmethod
    def joined(cls, parts: Sequence[Subspaces]) -> Subspaces:
        """Those of all parts, one after the other."""
        sides = [_joined([part.left for part in parts]), _joined([part.right for part in parts])]
        return cls(sides[0], sides[1], torch.cat([part.error for part in parts]))

    def ordered(self, positions: Sequence[int]) -> Subspaces:
        """Those of the matrices at these positions, in this order."""
        places = list(positions)

        def picked(side: Side | None) -> Side | None:
            return None if side is None else _each(side, lambda tensor: tensor[places])

        return Subspaces(picked(self.left), picked(self.right), self.error[places])

    def part(self, start: int, stop: int) -> Subspaces:
        """Those of the matrices from ``start`` up to ``stop``: views; all of them as they are."""
        if (start, stop) == (0, len(self.error)):
            return self

        def cut(side: Side | None) -> Side | None:
            return None if side is None else _each(side, lambda tensor: tensor[start:stop])

        return Subspaces(cut(self.left), cut(self.right), self.error[start:stop])

    def to(self, device: torch.device) -> Subspaces:
        """The same on another device."""

        def moved(side: Side | None) -> Side | None:
            return None if side is None else _each(side, lambda tensor: tensor.to(device))

        return Subspaces(moved(self.left), moved(self.right), self.error)

    @cached_property
    def lowers(self) -> tuple[Tensor | None, Tensor | None]:
        """Cholesky factors (L, k, k) float64 of both sides' Gram matrices, on the host."""
        grams = _products(((self.left, self.left), (self.right, self.right)))
        left, right = (None if gram is None else torch.linalg.cholesky(gram) for gram in grams)
        return left, right


@dataclass(frozen=True)
class Locking:
    """How much of the leading subspaces of L weights is that of others; on the host, float64, each (L,).

    ``left``, ``right``: ||U_kᵀ U'_k||²_F / k and ||V_kᵀ V'_k||²_F / k, the mean squared cosine of the principal angles;
    None where k is the whole of that side. ``error``: each is within this of the true one.
    """

    left: Tensor | None
    right: Tensor | None
    error: Tensor


def locking(now: Subspaces, end: Subspaces) -> Locking:
    """Subspace locking of weights with those at the end of their training (arXiv 2606.07082).

    Args:
        now, end: subspaces of the same matrices, against one reference.
    """
    crosses = _products(((now.left, end.left), (now.right, end.right)))
    found = [
        None if cross is None or over is None or under is None else _shared(cross, over, under)
        for cross, over, under in zip(crosses, now.lowers, end.lowers, strict=True)
    ]
    return Locking(found[0], found[1], _error(found, now.error + end.error))


def _shared(cross: Tensor, lower_a: Tensor, lower_b: Tensor) -> Tensor:
    """(L,) mean squared cosine between the spans of two bases, from inner products (L, k, k) and the Cholesky factors
    of both Gram matrices."""
    half = torch.linalg.solve_triangular(lower_a, cross, upper=False)
    core = torch.linalg.solve_triangular(lower_b, half.mT, upper=False)
    return (core.square().sum((-2, -1)) / core.shape[-1]).clamp_max(1.0)


def _error(found: Sequence[Tensor | None], angle: Tensor) -> Tensor:
    """(L,) how far the mean squared cosines can be off where every principal angle is known to within ``angle``.

    cos²(θ + d) differs from cos² θ by sin(2θ + d) sin d, at most (sin 2θ + d) d; and the mean of sin 2θ is at most
    2 √(l (1 − l)) for the mean l of cos² θ, by Cauchy and Schwarz.
    """
    wide = [
        angle * (2.0 * (shared * (1.0 - shared)).sqrt() + angle) for shared in found if shared is not None
    ]
    most = torch.stack(wide).amax(0) if wide else torch.zeros_like(angle)
    return (most + _ROUNDING).clamp_max(1.0)


def _products(pairs: Iterable[tuple[Side | None, Side | None]]) -> tuple[Tensor | None, ...]:
    """(L, k, k) inner products of each pair on the host, after one transfer; None where a side is missing."""
    return to_host([None if a is None or b is None else _product(a, b) for a, b in pairs])


def _product(a: Side, b: Side) -> Tensor:
    """All in float64: the factors' dtype would round it by a share of the squared rotation from the reference, and two
    checkpoints may differ by less."""
    found = a.lead.mT @ b.lead + a.tail.double().mT @ b.tail.double()
    if a.outside is not None and b.outside is not None:
        found = found + a.outside.double().mT @ b.outside.double()
    return found


def _leading(side: Side, k: int, same: Tensor) -> Side:
    """Copies of the first k columns; the reference's own where ``same``."""
    kept = _each(side.columns(0, k), lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    if not bool(same.any()):
        return kept
    there = same.to(kept.lead.device)[:, None, None]
    own = torch.eye(kept.lead.shape[-2], k, dtype=kept.lead.dtype, device=kept.lead.device)
    outside = None if kept.outside is None else kept.outside.masked_fill(there, 0.0)
    return Side(torch.where(there, own, kept.lead), kept.tail.masked_fill(there, 0.0), outside)


def _each(side: Side, change: Callable[[Tensor], Tensor]) -> Side:
    outside = None if side.outside is None else change(side.outside)
    return Side(change(side.lead), change(side.tail), outside)


def _joined(sides: Sequence[Side | None]) -> Side | None:
    """Sides of one shape, one after the other; in the widest of their dtypes."""
    there = [side for side in sides if side is not None]
    if not there:
        return None
    rests = [side.outside for side in there if side.outside is not None]
    lead, tail = torch.cat([side.lead for side in there]), torch.cat([side.tail for side in there])
    return Side(lead, tail, torch.cat(rests) if rests else None)
