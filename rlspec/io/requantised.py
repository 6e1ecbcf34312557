"""Numbers stored again as scaled fp8 codes, in the scheme of the ones that they take the place of.

A scale stays as it is as long as its block's new numbers lie in its range: what has not changed then keeps its code,
bit for bit. Where they do not, it becomes the smallest of its dtype that holds them, a power of two among powers of
two (E8M0, or float32 scales that hold nothing else).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlspec.io.quantised import scale_grid, scaled
from rlspec.ops.add_rounded import neighbour, rounded
from rlspec.ops.draws import Draws

# Entries of the rows that are rounded at a time, where one scale does not stand for more.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class ScaledCodes:
    """A matrix (m, n) as it is stored: float8 codes, their scale, and the block that config.json states."""

    name: str
    codes: Tensor
    scale_name: str
    scale: Tensor
    block: tuple[int, int] | None

    def numbers(self) -> Tensor:
        """codes * scale, (m, n) float32."""
        return scaled(self.name, self.codes, self.scale_name, self.scale, self.block)

    def replaced(self, weight: Tensor, *, draws: Draws | None = None) -> ScaledCodes:
        """Other numbers in the same scheme, shapes and dtypes as here.

        Args:
            weight: (m, n) float32, finite; an entry equal to what is stored here keeps its code if its scale stays.
            draws: round codes at random, unbiased, by these, instead of to nearest.
        """
        grid, (rows, columns) = scale_grid(self.name, self.codes, self.scale_name, self.scale, self.block)
        before, codes, grid = self.numbers(), self.codes.clone(), grid.clone()
        powers = grid.numel() > 1 and _are_powers(grid)
        m, n = codes.shape
        # Where one scale of an axis stands for all of it, its block may be larger than the matrix.
        rows, columns = min(rows, m), min(columns, n)
        step = max(1, _BLOCK // max(1, rows * n))
        moved = torch.zeros_like(grid, dtype=torch.bool)
        for first in range(0, grid.shape[0], step):
            own = slice(first, first + step)
            here = slice(first * rows, min((first + step) * rows, m))
            new, old = weight[here], before[here]
            changed = new != old
            limit = grid[own] * _reach(codes.dtype, draws is not None)
            over = changed & (new.abs() > _spread(limit, rows, columns, new.shape))
            outgrown = _largest(over.float(), rows, columns) > 0
            if bool(outgrown.any()):
                needed = _largest(new.abs(), rows, columns).double() / torch.finfo(codes.dtype).max
                grid[own] = torch.where(
                    outgrown, _holding(needed, self.scale.dtype, powers=powers), grid[own]
                )
                moved[own] = outgrown
            exact = new.double() / _spread(grid[own], rows, columns, new.shape).double()
            anew = _spread(moved[own], rows, columns, new.shape)
            original = torch.where(anew, exact.float(), codes[here].float())
            draw = None if draws is None else draws.uniform(first * rows, len(exact), n)
            found = rounded(original, exact, codes.dtype, draw)
            codes[here] = torch.where(changed | anew, found, codes[here])
        return replace(self, codes=codes, scale=_stored(self.scale, grid, moved))


def _reach(dtype: torch.dtype, stochastic: bool) -> float:
    """The largest number that does not need a larger scale: to nearest, half a step more than the dtype holds."""
    info = torch.finfo(dtype)
    half_step = 0.0 if stochastic else 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2
    return info.max + half_step


def _spread(grid: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    """The number of the block that each entry lies in."""
    wide = grid.repeat_interleave(columns, dim=1)[:, : shape[1]]
    return wide.repeat_interleave(rows, dim=0)[: shape[0]]


def _largest(x: Tensor, rows: int, columns: int) -> Tensor:
    """The largest entry of each block; entries are not negative."""
    below, beside = -x.shape[0] % rows, -x.shape[1] % columns
    padded = torch.nn.functional.pad(x, (0, beside, 0, below))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).amax(dim=(1, 3))


def _are_powers(grid: Tensor) -> bool:
    return bool((torch.frexp(grid).mantissa == 0.5).all())


def _holding(needed: Tensor, dtype: torch.dtype, *, powers: bool) -> Tensor:
    """The smallest scales of a dtype that are not below those needed, as float32."""
    if powers or _are_exponents(dtype):
        mantissa, exponent = torch.frexp(needed)
        return torch.exp2((exponent - (mantissa == 0.5).int()).clamp(-126, 127).float())
    found = needed.clamp_max(torch.finfo(dtype).max).to(dtype)
    return torch.where(found.double() < needed, neighbour(found, up=True), found).float()


def _stored(scale: Tensor, grid: Tensor, moved: Tensor) -> Tensor:
    """A scale with the numbers of a grid where those have moved, to the bit as it was elsewhere."""
    if not bool(moved.any()):
        return scale
    if not _are_exponents(scale.dtype):
        return torch.where(moved.view(scale.shape), grid.view(scale.shape).to(scale.dtype), scale)
    new = (torch.frexp(grid).exponent + 126).to(torch.uint8)
    bits = torch.where(moved.view(scale.shape), new.view(scale.shape), scale.view(torch.uint8))
    return bits.view(scale.dtype)


def _are_exponents(dtype: torch.dtype) -> bool:
    """Whether a scale's bytes are exponents of two: uint8, or E8M0, which not every torch has."""
    return dtype == torch.uint8 or dtype == getattr(torch, "float8_e8m0fnu", None)
