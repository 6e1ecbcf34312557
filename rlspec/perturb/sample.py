"""Which combinations of a pair's columns are looked at to tell what the pair leaves over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

_SIGNS = 16  # random sign combinations
_EDGE = 4  # columns taken one by one at the top and at the cut
_GROUPS = 12  # combinations of neighbours, of all columns between


@dataclass(frozen=True)
class Sample:
    """Which combinations of a pair's w columns are looked at, in this order: ``top`` single columns from the first on;
    ``groups`` combinations of neighbours with random signs, which share out all columns between; ``cut`` single ones,
    the last of the k; then sign combinations of all k. Signs are fixed by k alone.

    Every one of the k columns has its part in one of the first three kinds: a sample that left some out would miss an
    error that sits there alone."""

    k: int

    @property
    def cut(self) -> int:
        return min(_EDGE, self.k)

    @property
    def top(self) -> int:
        return min(_EDGE, self.k - self.cut)

    @property
    def groups(self) -> int:
        return min(_GROUPS, self.k - self.cut - self.top)

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """Combination e of the first three kinds is of columns [``borders[e]``, ``borders[e + 1]``)."""
        between = self.k - self.cut - self.top
        inner = [self.top + i * between // self.groups for i in range(self.groups)]
        return (*range(self.top), *inner, *range(self.k - self.cut, self.k + 1))

    @property
    def estimated(self) -> slice:
        """The combinations that estimates look at: all but those of all k."""
        return slice(0, self.top + self.groups + self.cut)

    @property
    def edges(self) -> list[int]:
        """The combinations that are single columns at the top and at the cut."""
        return [*range(self.top), *range(self.top + self.groups, self.estimated.stop)]

    @property
    def signs(self) -> slice:
        return slice(self.estimated.stop, self.estimated.stop + _SIGNS)

    def combinations(self, w: int) -> Tensor:
        """(w, c) float64."""
        sample = torch.zeros(w, self.signs.stop, dtype=torch.float64)
        sample[: self.k, self.estimated] = self.neighbours
        sample[: self.k, self.signs] = _signs(self.k, _SIGNS)
        return sample

    @cached_property
    def sizes(self) -> Tensor:
        """(e,) float64, of how many columns the estimated combinations are."""
        return torch.tensor(self.borders, dtype=torch.float64).diff()

    @cached_property
    def neighbours(self) -> Tensor:
        """(k, e) float64, the estimated combinations."""
        signs = _signs(self.k, 1)
        chosen = torch.zeros(self.k, self.estimated.stop, dtype=torch.float64)
        for e, (start, stop) in enumerate(pairwise(self.borders)):
            chosen[start:stop, e] = signs[start:stop, 0]
        return chosen


@lru_cache(maxsize=64)
def sample_of(k: int) -> Sample:
    """The sample of k columns, with what it has computed already."""
    return Sample(k)


def _signs(k: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.randint(0, 2, (k, count), generator=generator).double() * 2.0 - 1.0


def sampled_frobenius(products: Tensor) -> Tensor:
    """(L,) Frobenius norm of A from ``A ω`` (L, q, c) for random sign columns ω."""
    return (products.square().sum((-2, -1)) / products.shape[-1]).sqrt()
