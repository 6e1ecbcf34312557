"""How many leading directions to follow in a matrix: a share of its rank, a count, or a snap to a spectral
gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

import torch
from torch import Tensor

from rlspec.errors import OptionError

RankLike = Union["Rank", float, int, str]

_SNAP = 0.05  # "gap:" looks for the largest gap within this share of k on either side


@dataclass(frozen=True)
class Rank:
    """A rule that turns a spectrum into k, the number of leading directions.

    ``share``: k = share * min(m, n), at least 1. ``count``: k = value, at most min(m, n). ``gap``: like
    ``share``, then moved to the place within +-5 % of it where the relative drop between neighbouring
    singular values is largest.
    """

    kind: Literal["share", "count", "gap"]
    value: float

    @classmethod
    def parse(cls, rank: RankLike) -> Rank:
        """Read ``0.2`` (share), ``768`` (count), ``"0.2"``, ``"768"`` or ``"gap:0.2"``.

        Raises:
            OptionError: anything else, a share outside (0, 1], a count below 1.
        """
        if isinstance(rank, Rank):
            return rank
        text = str(rank).strip()
        kind: Literal["share", "count", "gap"] = "share"
        if text.startswith("gap:"):
            kind, text = "gap", text[len("gap:") :]
        elif text.isdigit():
            kind = "count"
        try:
            value = float(text)
        except ValueError:
            raise _invalid(rank) from None
        if kind == "count" and value >= 1:
            return cls(kind, value)
        if kind != "count" and 0.0 < value <= 1.0:
            return cls(kind, value)
        raise _invalid(rank)

    def resolve(self, spectrum: Tensor | int) -> int:
        """The rank k for one matrix.

        Args:
            spectrum: its singular values, shape (r,), descending; or just r = min(m, n) unless the rule is
            ``gap``.

        Raises:
            OptionError: a ``gap`` rule without the singular values.
        """
        r = spectrum if isinstance(spectrum, int) else int(spectrum.shape[-1])
        if self.kind == "count":
            return min(int(self.value), r)
        k = max(1, round(self.value * r))
        if self.kind == "share":
            return k
        if isinstance(spectrum, int):
            raise OptionError(f"rank {self} needs the singular values of the matrix, not only its size")
        return _snap(spectrum, k)

    def __str__(self) -> str:
        if self.kind == "count":
            return str(int(self.value))
        return f"gap:{self.value:g}" if self.kind == "gap" else f"{self.value:g}"


def _snap(spectrum: Tensor, k: int) -> int:
    """The index near k with the largest relative drop to the next singular value."""
    r = int(spectrum.shape[-1])
    low = max(1, round(k * (1.0 - _SNAP)))
    high = min(r - 1, round(k * (1.0 + _SNAP)))
    if high < low:
        return k
    before = spectrum[low - 1 : high].double()
    drop = (before - spectrum[low : high + 1].double()) / before.clamp_min(torch.finfo(torch.float64).tiny)
    return low + int(drop.argmax())


def _invalid(rank: object) -> OptionError:
    return OptionError(
        f"rank {rank!r} is not valid: give a share in (0, 1] such as 0.2, a count such as 768, or gap:0.2"
    )
