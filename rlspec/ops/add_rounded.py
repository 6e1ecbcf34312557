"""A change added to a weight and rounded to a dtype, row block by row block, with what the rounding ate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.backend import row_blocks
from rlspec.ops.draws import Draws
from rlspec.ops.table import choose

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

    @classmethod
    def of(cls, sums: Tensor) -> ChangeSums:
        """From a tensor (4,), in the order of the fields."""
        change_sq, lost_sq, tuned_sq, changed = sums.tolist()
        return cls(change_sq, lost_sq, tuned_sq, int(changed))

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
    draws: Draws | None = None,
    first: int = 0,
) -> tuple[Tensor, ChangeSums]:
    """``tuned + strength * change`` in ``dtype``, from float64 sums, and what came of it.

    Args:
        tuned: (m, n), any floating dtype.
        change: (m, n), float32 or float64.
        draws: round up or down at random, unbiased, by these, instead of to nearest.
        first: which row of the matrix that the draws are of ``tuned`` begins with.
    """
    m, n = tuned.shape
    if choose("add_rounded", tuned.device, (tuned.dtype, change.dtype, dtype), (1, m, n)) == "triton":
        from rlspec.kernels.add_rounded import add_rounded_triton

        weight, sums = add_rounded_triton(
            tuned.unsqueeze(0), change.unsqueeze(0), strength, dtype, keys=keys_of(draws), first=first
        )
        return weight[0], ChangeSums.of(sums[0])
    weight = torch.empty(m, n, dtype=dtype, device=tuned.device)
    sums = torch.zeros(4, dtype=torch.float64, device=tuned.device)
    for block in row_blocks(m, n, _DEVICE_BLOCK if tuned.is_cuda else _BLOCK):
        before = tuned[block].double()
        step = strength * change[block].double()
        draw = None if draws is None else draws.uniform(first + block.start, len(before), n).to(tuned.device)
        after = rounded(tuned[block], before + step, dtype, draw)
        weight[block] = after
        moved = after.double() - before
        parts = [x.square().sum() for x in (step, moved - step, before)]
        sums += torch.stack([*parts, torch.count_nonzero(moved).double()])
    return weight, ChangeSums.of(sums)


def keys_of(draws: Draws | None) -> list[tuple[int, int]] | None:
    return None if draws is None else [draws.key]


def rounded(original: Tensor, exact: Tensor, dtype: torch.dtype, draw: Tensor | None = None) -> Tensor:
    """``exact`` in ``dtype``: to the nearest, which is ``original`` where that is as near as any, or at random.

    Args:
        original: any floating dtype, the shape of ``exact``.
        exact: float64. What lies past the largest number of an 8-bit ``dtype`` becomes that.
        draw: float64 in (0, 1), the shape of ``exact``: round at random, by these.
    """
    if dtype.itemsize == 1:  # whether a conversion saturates depends on torch
        largest = torch.finfo(dtype).max
        exact = exact.clamp(-largest, largest)
    return _nearest(original, exact, dtype) if draw is None else _stochastic(exact, dtype, draw)


def _nearest(original: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """An entry whose change is under half a unit in the last place stays as it is."""
    nearest = exact.to(dtype)
    kept = original.to(dtype)
    # A conversion by way of float32 rounds twice, and may move an entry that should stay.
    stay = (exact - kept.double()).abs() <= (exact - nearest.double()).abs()
    return torch.where(stay, kept, nearest)


def _stochastic(exact: Tensor, dtype: torch.dtype, draw: Tensor) -> Tensor:
    """The neighbours of each entry, with probabilities that make the mean right."""
    nearest = exact.to(dtype)
    above = nearest.double() > exact
    low = torch.where(above, neighbour(nearest, up=False), nearest)
    high = torch.where(above, nearest, neighbour(nearest, up=True))
    # The distance of the neighbours is a power of two: no rounding, wherever this is computed.
    up = draw * (high.double() - low.double()) < exact - low.double()
    return torch.where(up, high, low)


def neighbour(x: Tensor, *, up: bool) -> Tensor:
    """The next number above or below; of an 8-bit dtype, for which torch has no nextafter, by its bits."""
    if x.dtype.itemsize > 1:
        return torch.nextafter(x, torch.full_like(x, torch.inf if up else -torch.inf))
    bits = x.view(torch.uint8).short()
    magnitude, negative = bits & 0x7F, bits > 0x7F
    signed = torch.where(negative, -magnitude, magnitude) + (1 if up else -1)
    return torch.where(signed < 0, 0x80 - signed, signed).to(torch.uint8).view(x.dtype)
