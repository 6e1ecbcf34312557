"""Which restorations a search tries, and in which order: controls beside a coarse grid, then closer to the best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlspec.restore.options import ELEMENTWISE, RestoreOptions

#: Attention and MLP: where the first candidates lie. The straight line takes every tensor, as WiSE-FT does.
MATRICES, EVERYTHING = "attn,mlp", ".*"
LAST = "67%:100%"


@dataclass(frozen=True)
class Candidate:
    """One restoration: what differs from a restoration's defaults."""

    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> RestoreOptions:
        return RestoreOptions(**self.settings)

    @property
    def is_control(self) -> bool:
        return self.settings["mode"] in ELEMENTWISE

    def but(self, **changes: Any) -> Candidate:
        return replace(self, settings={**self.settings, **changes})


def directions(rank: float | str, modules: str = MATRICES) -> Candidate:
    return Candidate({"mode": "directions", "rank": rank, "modules": modules})


def straight_line(share: float) -> Candidate:
    return Candidate({"mode": "interpolate", "strength": share, "modules": EVERYTHING})


def coarse() -> list[Candidate]:
    """The first round. It alternates, so that a small budget holds restorations and controls both. Which matrices are
    restored can decide everything (README, `rlspec study rank` and `layers`), so MLPs alone and the last layers alone
    are among the first."""
    return [
        directions(0.2),
        straight_line(0.5),
        directions(0.5, "mlp"),
        directions(0.2).but(layers=LAST),
        directions(0.5),
        straight_line(0.25),
        Candidate({"mode": "copy", "modules": "mlp"}),
        straight_line(0.75),
        directions(0.1),
        directions(0.2, "q,k,v"),
        Candidate({"mode": "copy", "modules": "attn"}),
    ]


def around(best: Candidate) -> list[Candidate]:
    """The second round: the best restoration with one setting changed at a time."""
    found = [best.but(layers=layers) for layers in (LAST, "33%:67%", "0:33%")]
    found += [best.but(mode=mode) for mode in ("both", "directions", "values")]
    found += [best.but(modules=modules) for modules in ("attn", "mlp", "all")]
    return [*found, best.but(part="tail")]


def closer(best: Candidate, tried_ranks: Sequence[float]) -> list[Candidate]:
    """The third round: ranks halfway to the neighbours, and less than the whole change."""
    rank = float(best.settings["rank"])
    lower = max((r for r in tried_ranks if r < rank), default=rank / 2)
    higher = min((r for r in tried_ranks if r > rank), default=min(0.99, 2 * rank))
    halves = (round((lower + rank) / 2, 4), round((rank + higher) / 2, 4))
    found = [best.but(rank=half) for half in halves if half != rank]
    return found + [best.but(strength=strength) for strength in (0.75, 0.5, 0.25)]


def new(candidates: Sequence[Candidate], tried: Sequence[Candidate]) -> Iterator[Candidate]:
    yield from (candidate for candidate in candidates if candidate not in tried)
