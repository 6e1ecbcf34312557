"""What to restore and how: the settings of one restoration, checked before anything is read. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args

from rlspec.errors import OptionError, check_type
from rlspec.linalg.rank import Rank, RankLike
from rlspec.settings import setting

Mode = Literal["directions", "directions_and_values", "values", "tail", "band", "copy", "interpolate"]
Rounding = Literal["nearest", "stochastic"]
Dtype = Literal["keep", "float32"]
# What users write -> what restore_matrix calls it.
MODES: dict[str, Mode] = {
    "directions": "directions",
    "values": "values",
    "both": "directions_and_values",
    "directions_and_values": "directions_and_values",
    "copy": "copy",
    "interpolate": "interpolate",
}
#: Modes that work entry by entry: no decomposition, no rank, any shape.
ELEMENTWISE = ("copy", "interpolate")


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """The settings that decide what a restored checkpoint holds (how fast it comes to be is not among them).

    Attributes:
        rank: how many directions of each matrix: a share such as 0.2 (1.0 is all of them), a count such as 64 (1 is
            one of them), "energy:0.9" or "gap:0.2"; see :class:`rlspec.spectra.Rank`.
        part: "top" (the leading ones), "tail" (the last ones) or "I:J", the half-open range of indices, each a
            number or a share such as "10%:25%".
        mode: "directions", "values", "both", "copy" or "interpolate", see :func:`rlspec.restore_matrix`.
        strength: share of the change that is made, in [0, 1].
        modules: "q,k,v", "attn", "mlp", "embed", "lm_head", "all", or a regular expression for tensor names.
        layers: "0-9,20" (both ends), "0:10" (half-open) or "0:25%"; None for all. What belongs to no layer
            (embed, lm_head) is chosen by ``modules`` alone.
        dtype: of the restored matrices: that of the tuned checkpoint, or float32.
        rounding: "nearest" or "stochastic" (unbiased: changes under half a unit survive on average).
        seed: of stochastic rounding; the draw depends on it and on the tensor's name, not on any order.
        exact: LAPACK in float64 throughout, no cache.
        device: where matrices are computed: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N"; decompositions
            are the host's anyway. It is among the settings because another device rounds otherwise.
    """

    rank: RankLike = setting(
        0.2, "Directions of each matrix: a share (1.0 is all), a count (1 is one), energy:0.9 or gap:0.2."
    )
    part: str = setting("top", "top, tail, or a range of indices such as 0:64 or 10%:25%.")
    mode: str = setting("directions", "directions, values, both, copy or interpolate.")
    strength: float = setting(1.0, "Share of the change to make, 0 to 1.")
    modules: str | Iterable[str] = setting(
        "q,k,v", "q, k, v, o, mlp, embed, lm_head, attn, all, or a regular expression for tensor names."
    )
    layers: str | None = setting(None, "Layers such as 0:25% or 0-9,20.", default_told="all")
    dtype: Dtype = setting("keep", "Of the restored matrices: keep or float32.")
    rounding: Rounding = setting("nearest", "To the stored dtype: nearest or stochastic.")
    seed: int = setting(0, "Seed of stochastic rounding.")
    exact: bool = setting(False, "LAPACK in float64 for everything; slow.")
    device: str = setting("auto", "Where matrices are computed: auto, cpu, cuda or cuda:<index>.")

    def __post_init__(self) -> None:
        check_type("part", self.part, str, "a text")
        check_type("strength", self.strength, Real, "a number")
        check_type("modules", self.modules, Iterable, "names, or a text")
        check_type("layers", self.layers, (str, NoneType), "a text such as '0:25%', '0-9,20' or '3'")
        check_type("seed", self.seed, Integral, "a whole number")
        if not isinstance(self.modules, str):
            object.__setattr__(self, "modules", ",".join(self.modules))
        Rank.parse(self.rank)
        object.__setattr__(self, "device", str(_choose_device(self.device)))
        _choice("mode", self.mode, [mode for mode in MODES if "_" not in mode], MODES)
        _choice("dtype", self.dtype, get_args(Dtype))
        _choice("rounding", self.rounding, get_args(Rounding))
        if not 0.0 <= self.strength <= 1.0:
            raise OptionError(f"strength={self.strength!r} is not in [0, 1]")
        if self.part not in ("top", "tail"):
            _band(self.part, 1 << 62)
        if self.part != "top" and self.restore_mode in ELEMENTWISE:
            raise OptionError(
                f"part={self.part!r} says nothing to mode={self.mode!r}, which takes whole matrices"
            )
        if self.part == "tail" and self.restore_mode != "directions" and Rank.parse(self.rank).needs_values:
            raise OptionError(f"part='tail' with mode={self.mode!r} needs a rank that is a share or a count")
        if self.layers is not None:
            _pieces(self.layers)

    @property
    def restore_mode(self) -> Mode:
        """The mode as :func:`rlspec.restore_matrix` names it, parts aside."""
        return MODES[self.mode]

    @property
    def elementwise(self) -> bool:
        return self.restore_mode in ELEMENTWISE

    def arguments(self, r: int) -> dict[str, Any] | None:
        """``mode`` and ``band`` of restore_matrix for a matrix with ``r`` singular values.

        None where the range of indices lies past them all.
        """
        if self.part == "top":
            return {"mode": self.restore_mode}
        if self.part == "tail" and self.restore_mode == "directions":
            return {"mode": "tail"}
        if self.part == "tail":
            return {"mode": self.restore_mode, "band": (r - (self.directions(r) or 0), r)}
        start, stop = _band(self.part, r)
        mode = "band" if self.restore_mode == "directions" else self.restore_mode
        return {"mode": mode, "band": (start, min(stop, r))} if start < min(stop, r) else None

    def directions(self, r: int) -> int | None:
        """How many directions of ``r`` are replaced; None where that depends on the singular values."""
        if self.elementwise:
            return r
        if self.part not in ("top", "tail"):
            start, stop = _band(self.part, r)
            return max(0, min(stop, r) - start)
        rule = Rank.parse(self.rank)
        return None if rule.needs_values else rule.resolve(r)

    def chosen_layers(self, count: int) -> frozenset[int] | None:
        """The layers meant, of ``count``; None for all.

        Raises:
            OptionError: a layer that the model does not have, or none chosen.
        """
        if self.layers is None:
            return None
        chosen: set[int] = set()
        for first, last, half_open in _pieces(self.layers):
            start, stop = _end(first, count), _end(last, count)
            stop += 0 if half_open else 1
            if stop > count or start >= stop:
                found = f"{count} layers, 0 to {count - 1}" if count else "no numbered layers"
                raise OptionError(
                    f"layers={self.layers!r}: no {start}..{stop - 1} here; the model has {found}"
                )
            chosen.update(range(start, stop))
        return frozenset(chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the report and the fingerprint of a restoration."""
        return {**vars(self), "rank": str(Rank.parse(self.rank)), "mode": self.restore_mode}


def _choose_device(name: str) -> object:
    from rlspec.backend import choose_device  # here: it needs torch, and a command's --help does not

    return choose_device(name)


def _choice(name: str, value: object, valid: Iterable[str], known: Iterable[str] = ()) -> None:
    if value not in (*valid, *known):
        raise OptionError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")


_END = r"(\d+(?:\.\d+)?%|\d+)"


def _band(text: str, r: int) -> tuple[int, int]:
    match = re.fullmatch(rf"{_END}:{_END}", text)
    if match is None:
        raise OptionError(f"part={text!r} is not valid: top, tail, or indices such as 0:64 or 10%:25%")
    start, stop = _end(match[1], r), _end(match[2], r)
    if start >= stop and (match[1].endswith("%") == match[2].endswith("%")) and r >= 1 << 62:
        raise OptionError(f"part={text!r}: the range is empty")
    return start, stop


def _pieces(text: str) -> list[tuple[str, str, bool]]:
    """(first, last, half-open) of every piece of a text for ``layers``."""
    found = []
    for piece in text.split(","):
        match = re.fullmatch(rf"{_END}(?:([:-]){_END})?", piece.strip())
        ends_are_counts = match is not None and "%" not in piece
        if match is None or (match[2] != ":" and not ends_are_counts):
            raise OptionError(f"layers={text!r} is not valid: give for example 0:25%, 0-9,20 or 0:10")
        found.append((match[1], match[3] or match[1], match[2] == ":"))
    return found


def _end(text: str, count: int) -> int:
    """One end of a range; shares are rounded up, so that neighbouring ranges neither overlap nor leave a gap."""
    if not text.endswith("%"):
        return int(text)
    return min(count, math.ceil(round(float(text[:-1]) / 100 * count, 9)))
