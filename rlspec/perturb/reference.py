"""What an engine measures against: reference factors of a stack of matrices, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlspec.linalg.products import ALIGNED
from rlspec.linalg.transfer import index_on
from rlspec.perturb.batch import take
from rlspec.perturb.matrix import MatrixBasis
from rlspec.perturb.sample import Sample, sample_of

_CHOICE = 4  # widths to choose a gap from
_WHOLE = 0.85  # from this share of the columns on a guard band takes all
#: Pairs across the guard band's end closer than this (relative difference of squares) are damped: they would
#: turn into each other many times over, and a first-order formula has nothing to say about them.
FLOOR = 0.02


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
    def of(
        cls,
        matrices: Sequence[MatrixBasis],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        width: int | None = None,
    ) -> Reference:
        """The factors of matrices of one shape, weight dtype and k, stacked.

        Args:
            device: where to.
            dtype: of U and Vh; default their own.
            width: of a larger stack that these are a part of; default: chosen for these, see :func:`guard_width`.
        """

        def moved(tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
            return stack([t.to(device=device, dtype=dtype, non_blocking=True) for t in tensors])

        made = cls(
            names=tuple(m.name for m in matrices),
            W=moved([m.W for m in matrices]),
            U=moved([m.U for m in matrices], dtype),
            S=moved([m.S for m in matrices]),
            Vh=moved([m.Vh for m in matrices], dtype),
            k=matrices[0].k,
        )
        made.__dict__["values"] = stack([m.S for m in matrices])
        if width is not None:
            made.__dict__["width"] = width
        return made

    def select(self, positions: Sequence[int]) -> Reference:
        """The matrices of the given positions; all of them without a copy."""
        if len(positions) == len(self.names):
            return self
        names = tuple(self.names[i] for i in positions)
        return self._some(names, lambda t: take(t, positions))

    def part(self, start: int, stop: int) -> Reference:
        """The matrices from ``start`` up to ``stop``: views, for which a device needs no memory."""
        if (start, stop) == (0, len(self.names)):
            return self
        return self._some(self.names[start:stop], lambda t: t[start:stop])

    def _some(self, names: tuple[str, ...], some: Callable[[Tensor], Tensor]) -> Reference:
        w, u, s, vh = (some(t) for t in (self.W, self.U, self.S, self.Vh))
        chosen = Reference(names, w, u, s, vh, self.k)
        # A stack has one width; nothing that is known already is asked of the device again.
        chosen.__dict__.update(
            width=self.width,
            combinations=self.combinations,
            last_columns=self.last_columns,
            values=some(self.values),
        )
        return chosen

    def to(self, device: torch.device | str) -> Reference:
        """The same on another device; itself where it is there."""
        if torch.device(device) == self.device:
            return self
        w, u, s, vh = (t.to(device) for t in (self.W, self.U, self.S, self.Vh))
        moved = Reference(self.names, w, u, s, vh, self.k)
        moved.__dict__.update(width=self.width, values=self.values)
        return moved

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.W.shape[-2]), int(self.W.shape[-1])

    @property
    def device(self) -> torch.device:
        return self.W.device

    @cached_property
    def values(self) -> Tensor:
        """S on the host, (L, r) float64: what decisions are made from."""
        return self.S.cpu()

    @cached_property
    def narrow(self) -> Tensor:
        """S in the dtype of the factors, (L, r)."""
        return self.S.to(self.U.dtype)

    @cached_property
    def sample(self) -> Sample:
        """Which combinations of a pair's columns are looked at."""
        return sample_of(self.k)

    @cached_property
    def combinations(self) -> Tensor:
        """Those combinations, (w, c) float64, on the reference's device."""
        return self.sample.combinations(self.width).to(self.device)

    @cached_property
    def last_columns(self) -> Tensor:
        """Of each combination that estimates look at, the column of its smallest value, (e,) int64, likewise."""
        return index_on([stop - 1 for stop in self.sample.borders[1:]], self.S)

    @cached_property
    def clear(self) -> Tensor:
        """(L,) bool on the host: whether the k-th value lies so far above what follows the guard band that its
        rotation is not damped, see ``first_order.FLOOR``."""
        s, k, w = self.values, self.k, self.width
        if w >= s.shape[-1]:
            return torch.ones(s.shape[0], dtype=torch.bool)
        last, beyond = s[..., k - 1], s[..., w]
        return (last - beyond) * (last + beyond) > FLOOR * last.square()

    @cached_property
    def width(self) -> int:
        """w: the k columns followed and a guard band past the cut, see :func:`guard_width`."""
        return guard_width(self.values, self.k, max(self.shape))


def guard_width(values: Tensor, k: int, longest: int) -> int:
    """Where the guard band of a stack ends: k columns and some past the cut.

    It ends where the smallest gap over the stack is largest; among multiples of `ALIGNED` where there is a choice of
    them, since gaps in a flat spectrum differ little.

    Args:
        values: (L, r) float64, descending, on the host.
        longest: the longer side of a matrix.
    """
    floor = values[..., :1] * longest * torch.finfo(torch.float32).eps
    rank = int((values > floor).sum(-1).min())  # columns of zero singular values have no direction to follow
    low, high = _band(k)
    if high >= min(rank, round(_WHOLE * values.shape[-1])):
        return max(k, rank)
    before = values[..., low - 1 : high]
    drop = ((before - values[..., low : high + 1]) / before).amin(0).tolist()
    widths = [w for w in range(low, high + 1) if w % ALIGNED == 0]
    if len(widths) < _CHOICE:
        widths = list(range(low, high + 1))
    return max(widths, key=lambda w: drop[w - low])


def widest(k: int, r: int) -> int:
    """The most columns that :attr:`Reference.width` comes to, where k of r are followed."""
    _, high = _band(k)
    return r if high >= round(_WHOLE * r) else high


def _band(k: int) -> tuple[int, int]:
    """Where the guard band may end."""
    return k + max(8, k // 4), k + max(12, k // 2)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """(L, ...) from L tensors; a single one is only viewed, not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
