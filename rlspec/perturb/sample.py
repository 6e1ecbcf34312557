"""Which combinations of a pair's columns are looked at to tell what the pair leaves over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_SIGNS = 16  # random sign combinations
_EDGE = 4  # columns taken one by one at the cut and at the top
_SPREAD = 12  # columns taken evenly over those before the cut's


@dataclass(frozen=True)
class Sample:
    """Which combinations of a pair's w columns are looked at, in this order: ``top`` single columns from the first on,
    ``spread`` single ones over all but the last, ``cut`` single ones, the last of the k; then sign combinations of
    all k, fixed by k alone."""

    k: int

    @property
    def cut(self) -> int:
        return min(_EDGE, self.k)

    @property
    def top(self) -> int:
        return min(_EDGE, self.k - self.cut)

    @property
    def spread(self) -> int:
        return min(_SPREAD, self.k - self.cut)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """The single columns, top, spread and cut."""
        rest = self.k - self.cut
        even = [(2 * i + 1) * rest // (2 * self.spread) for i in range(self.spread)]
        return (*range(self.top), *even, *range(rest, self.k))

    @property
    def singles(self) -> int:
        return self.top + self.spread + self.cut

    @property
    def estimated(self) -> slice:
        """The combinations that estimates look at: spread and cut."""
        return slice(self.top, self.singles)

    @property
    def edges(self) -> list[int]:
        """The combinations that are single columns at the top and at the cut."""
        return [*range(self.top), *range(self.top + self.spread, self.singles)]

    @property
    def signs(self) -> slice:
        return slice(self.singles, self.singles + _SIGNS)

    def combinations(self, w: int) -> Tensor:
        """(w, c) float64."""
        generator = torch.Generator().manual_seed(self.k)
        signs = torch.randint(0, 2, (self.k, _SIGNS), generator=generator).double() * 2.0 - 1.0
        sample = torch.zeros(w, self.singles + _SIGNS, dtype=torch.float64)
        sample[list(self.columns), range(self.singles)] = 1.0
        sample[: self.k, self.signs] = signs
        return sample
