"""How many leading directions to follow in a matrix: a share of its rank, a count, a share of its energy, or a
snap to a spectral gap."""

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
    singular values is largest. ``energy``: the fewest whose squared singular values sum to that share of all.
    """

    kind: Literal["share", "count", "gap", "energy"]
    value: float

    @classmethod
    def parse(cls, rank: RankLike) -> Rank:
        """Read ``0.2`` (share), ``768`` (count), ``"0.2"``, ``"768"``, ``"gap:0.2"`` or
        ``"energy:0.9"``.

        Raises:
            OptionError: anything else, a share outside (0, 1], a count below 1.
        """
        if isinstance(rank, Rank):
            return rank
        text = str(rank).strip()
        kind: Literal["share", "count", "gap", "energy"] = "share"
        if text.startswith("gap:"):
            kind, text = "gap", text[len("gap:") :]
        elif text.startswith("energy:"):
            kind, text = "energy", text[len("energy:") :]
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
            spectrum: its singular values, shape (r,), descending; or just r = min(m, n) unless
                :attr:`needs_values`.

        Raises:
            OptionError: a rule that needs the singular values is not given them.
        """
        r = spectrum if isinstance(spectrum, int) else int(spectrum.shape[-1])
        if self.kind == "count":
            return min(int(self.value), r)
        k = max(1, round(self.value * r))
        if self.kind == "share":
            return k
        if isinstance(spectrum, int):
            raise OptionError(f"rank {self} needs the singular values of the matrix, not only its size")
        return _snap(spectrum, k) if self.kind == "gap" else _energy(spectrum, self.value)

    @property
    def needs_values(self) -> bool:
        """Whether k depends on the singular values, not on the size of the matrix alone."""
        return self.kind in ("gap", "energy")

    def __str__(self) -> str:
        if self.kind == "count":
            return str(int(self.value))
        return f"{self.kind}:{self.value:g}" if self.needs_values else f"{self.value:g}"


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


def _energy(spectrum: Tensor, share: float) -> int:
    """The fewest leading values whose squares sum to ``share`` of the sum of all squares; at least 1."""
    total = spectrum.double().square().cumsum(-1)
    return min(1 + int((total < share * total[-1]).sum()), int(spectrum.shape[-1]))


def _invalid(rank: object) -> OptionError:
    return OptionError(
        f"rank {rank!r} is not valid: give a share in (0, 1] such as 0.2, a count such as 768, gap:0.2 or energy:0.9"
    )
