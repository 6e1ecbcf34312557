"""How many leading directions to follow in a matrix: a share of its rank, a count, a share of its energy, or a
snap to a spectral gap."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Union

from rlspec.errors import OptionError
from rlspec.linalg.shares import count_of_share

if TYPE_CHECKING:  # settings hold ranks, and --help reads settings without torch
    from torch import Tensor

RankLike = Union["Rank", float, int, str]

# How a count and a share are written. "1." and "1e0" could be meant as either, so they are neither.
_COUNT = re.compile(r"[1-9][0-9]*")
_SHARE = re.compile(r"0?\.[0-9]+|1\.0+|[1-9](\.[0-9]+)?e-[0-9]+")

_SNAP = 0.05  # "gap:" looks for the largest gap within this share of k on either side


@dataclass(frozen=True)
class Rank:
    """A rule that turns a spectrum into k, the number of leading directions.

    ``share``: k = share * min(m, n), rounded, at least 1. ``count``: k = value, at most min(m, n). So ``1`` is one
    direction and ``1.0`` all of them. ``gap``: like
    ``share``, then moved to the place within +-5 % of it where the relative drop between neighbouring
    singular values is largest. ``energy``: the fewest whose squared singular values sum to that share of all.
    """

    kind: Literal["share", "count", "gap", "energy"]
    value: float

    @classmethod
    def parse(cls, rank: RankLike) -> Rank:
        """Read ``0.2`` (share), ``768`` (count), ``"0.2"``, ``"768"``, ``"gap:0.2"`` or
        ``"energy:0.9"``. ``1`` and ``"1"`` are one direction, ``1.0`` and ``"1.0"`` all of them.

        Raises:
            OptionError: anything else, a share outside (0, 1], a count below 1, what could be meant as either
                (``"1."``, ``64.0``, True).
        """
        if isinstance(rank, Rank):
            return rank
        text = str(rank).strip()
        if _COUNT.fullmatch(text):
            return cls("count", float(text))
        kind, colon, number = text.rpartition(":")
        if _SHARE.fullmatch(number) or (colon and number == "1"):
            share = float(number)
            if 0.0 < share <= 1.0 and kind in ("gap", "energy"):
                return cls("gap" if kind == "gap" else "energy", share)
            if 0.0 < share <= 1.0 and not colon:
                return cls("share", share)
        raise _invalid(rank)

    def resolve(self, spectrum: Tensor | int) -> int:
        """The rank k for one matrix.

        Args:
            spectrum: its singular values, shape (r,), descending; or just r = min(m, n) unless
                :attr:`needs_values`.

        Raises:
            OptionError: a rule that needs the singular values is not given them.
        """
        r = spectrum if isinstance(spectrum, int) else int(spectrum.shape[-1])
        if self.kind == "count":
            return min(int(self.value), r)
        k = count_of_share(self.value, r)
        if self.kind == "share":
            return k
        if isinstance(spectrum, int):
            raise OptionError(
                f"rank={str(self)!r} needs the singular values of the matrix, not only its size"
            )
        return _snap(spectrum, k) if self.kind == "gap" else _energy(spectrum, self.value)

    @property
    def needs_values(self) -> bool:
        """Whether k depends on the singular values, not on the size of the matrix alone."""
        return self.kind in ("gap", "energy")

    def __str__(self) -> str:
        if self.kind == "count":
            return str(int(self.value))
        share = repr(float(self.value))  # 1.0 and not 1, which is a count
        return f"{self.kind}:{share}" if self.needs_values else share


def _snap(spectrum: Tensor, k: int) -> int:
    """The index near k with the largest relative drop to the next singular value."""
    r = int(spectrum.shape[-1])
    low = max(1, round(k * (1.0 - _SNAP)))
    high = min(r - 1, round(k * (1.0 + _SNAP)))
    if high < low:
        return k
    before = spectrum[low - 1 : high].double()
    drop = (before - spectrum[low : high + 1].double()) / before.clamp_min(sys.float_info.min)
    return low + int(drop.argmax())


def _energy(spectrum: Tensor, share: float) -> int:
    """The fewest leading values whose squares sum to ``share`` of the sum of all squares; at least 1."""
    total = spectrum.double().square().cumsum(-1)
    return min(1 + int((total < share * total[-1]).sum()), int(spectrum.shape[-1]))


def _invalid(rank: object) -> OptionError:
    return OptionError(
        f"rank={rank!r} is not valid: give a share such as 0.2 (1.0 is all directions), a count such as 768 "
        "(1 is one direction), gap:0.2 or energy:0.9"
    )
