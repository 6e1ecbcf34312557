"""A change added to a weight and rounded to a dtype, row block by row block, with what the rounding ate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of a row block: its float64 temporaries stay in a processor's cache; a device wants launches that fill it.
_BLOCK, _DEVICE_BLOCK = 1 << 17, 1 << 24


@dataclass
class ChangeSums:
    """What a change does to entries: squares of Frobenius norms in float64, and a count.

    ``change_sq`` of the change meant, ``lost_sq`` of the difference between it and the change made, ``tuned_sq`` of
    the weight before; ``entries_changed`` counts entries of another value than before.
    """

    change_sq: float = 0.0
    lost_sq: float = 0.0
    tuned_sq: float = 0.0
    entries_changed: int = 0

    def add(self, other: ChangeSums) -> None:
        self.change_sq += other.change_sq
        self.lost_sq += other.lost_sq
        self.tuned_sq += other.tuned_sq
        self.entries_changed += other.entries_changed

    @property
    def frobenius(self) -> float:
        """Norm of the change meant."""
        return math.sqrt(self.change_sq)

    @property
    def relative(self) -> float:
        """The same over the norm of the weight before; 0 where that is 0."""
        return math.sqrt(self.change_sq / self.tuned_sq) if self.tuned_sq else 0.0

    @property
    def rounding_share(self) -> float:
        """Norm of what rounding added or lost, over that of the change meant; 0 where that is 0."""
        return math.sqrt(self.lost_sq / self.change_sq) if self.change_sq else 0.0


def add_rounded(
    tuned: Tensor,
    change: Tensor,
    strength: float,
    dtype: torch.dtype,
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ChangeSums]:
    """``tuned + strength * change`` in ``dtype``, from float64 sums, and what came of it.

    Args:
        tuned: (m, n), any floating dtype.
        change: (m, n), float32 or float64.
        stochastic: round up or down at random, unbiased, instead of to nearest.
        generator: of the CPU, for the random draw; blocks draw in order, and a device is sent what the CPU would draw.
    """
    m, n = tuned.shape
    weight = torch.empty(m, n, dtype=dtype, device=tuned.device)
    sums = torch.zeros(4, dtype=torch.float64, device=tuned.device)
    rows = max(1, (_DEVICE_BLOCK if tuned.is_cuda else _BLOCK) // max(n, 1))
    for start in range(0, m, rows):
        block = slice(start, start + rows)
        before = tuned[block].double()
        step = strength * change[block].double()
        after = rounded(tuned[block], before + step, dtype, stochastic=stochastic, generator=generator)
        weight[block] = after
        moved = after.double() - before
        parts = [x.square().sum() for x in (step, moved - step, before)]
        sums += torch.stack([*parts, torch.count_nonzero(moved).double()])
    change_sq, lost_sq, tuned_sq, changed = sums.tolist()
    return weight, ChangeSums(change_sq, lost_sq, tuned_sq, int(changed))


def rounded(
    original: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``exact`` in ``dtype``: to the nearest, which is ``original`` where that is as near as any, or at random.

    Args:
        original: any floating dtype, the shape of ``exact``.
        exact: float64. What lies past the largest number of an 8-bit ``dtype`` becomes that.
        stochastic, generator: as of `add_rounded`.
    """
    if dtype.itemsize == 1:  # whether a conversion saturates depends on torch
        largest = torch.finfo(dtype).max
        exact = exact.clamp(-largest, largest)
    return _stochastic(exact, dtype, generator) if stochastic else _nearest(original, exact, dtype)


def _nearest(original: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """An entry whose change is under half a unit in the last place stays as it is."""
    nearest = exact.to(dtype)
    kept = original.to(dtype)
    # A conversion by way of float32 rounds twice, and may move an entry that should stay.
    stay = (exact - kept.double()).abs() <= (exact - nearest.double()).abs()
    return torch.where(stay, kept, nearest)


def _stochastic(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """The neighbours of each entry, with probabilities that make the mean right."""
    nearest = exact.to(dtype)
    above = nearest.double() > exact
    low = torch.where(above, neighbour(nearest, up=False), nearest)
    high = torch.where(above, nearest, neighbour(nearest, up=True))
    share = (exact - low.double()) / (high.double() - low.double())
    draw = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
    return torch.where(draw.to(exact.device) < share, high, low)


def neighbour(x: Tensor, *, up: bool) -> Tensor:
    """The next number above or below; of an 8-bit dtype, for which torch has no nextafter, by its bits."""
    if x.dtype.itemsize > 1:
        return torch.nextafter(x, torch.full_like(x, torch.inf if up else -torch.inf))
    bits = x.view(torch.uint8).short()
    magnitude, negative = bits & 0x7F, bits > 0x7F
    signed = torch.where(negative, -magnitude, magnitude) + (1 if up else -1)
    return torch.where(signed < 0, 0x80 - signed, signed).to(torch.uint8).view(x.dtype)
