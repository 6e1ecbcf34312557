"""What a model has read of conversations, kept from one turn to the next.

The next turn's prompts are laid out like any others, padded on the left; the columns that every row has in common
with what was kept are filled in instead of read:

    kept    . . p p p a a x x      next    . . . p p p a | a u u u
            . p p p p a a a a              . . p p p p a | a a a u
                                           filled in     | read

x are columns that a finished row went on for. A row that has more than the others must reads the rest again, so
that there are no gaps: whatever a model makes of distances between columns, they are those of a batch read whole.

Axes: B rows, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from rlspec.train.packing import common_prefix

Layers = list[tuple[Tensor, Tensor]]  # keys and values, (B, heads, L, width)


@dataclass(frozen=True)
class _Kept:
    """One conversation's columns in a batch that was read."""

    layers: Layers
    row: int
    first: int  # column of its first token
    ids: list[int]  # the tokens that were read, from that column on


class Memory:
    """Keys and values of conversations, each under a name."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def keep(self, name: int, layers: Layers, row: int, first: int, ids: list[int]) -> None:
        """Remember row ``row`` of a batch, whose columns from ``first`` on hold ``ids``."""
        self._kept[name] = _Kept(layers, row, first, ids)

    def recall(self, names: Sequence[int], prompts: Sequence[Sequence[int]]) -> DynamicCache | None:
        """The first columns of these conversations' prompts, padded on the left to the longest; None where
        nothing is known. What was kept is forgotten.
        """
        kept, self._kept = self._kept, {}
        if any(name not in kept for name in names):
            return None
        rows = [kept[name] for name in names]
        width = max(map(len, prompts))
        # The last token is always read: its logits are what is asked for.
        known = (min(common_prefix(row.ids, prompt), len(prompt) - 1) for row, prompt in zip(rows, prompts))
        filled = width - max(len(prompt) - count for prompt, count in zip(prompts, known))
        if filled <= 0:
            return None
        sources: dict[int, list[int]] = {}
        for b, row in enumerate(rows):
            sources.setdefault(id(row.layers), []).append(b)
        cache = DynamicCache()
        for number in range(len(rows[0].layers)):
            keys, values = (
                self._gather(rows, prompts, sources, number, part, width, filled) for part in (0, 1)
            )
            cache.update(keys, values, number)
        return cache

    @staticmethod
    def _gather(
        rows: Sequence[_Kept],
        prompts: Sequence[Sequence[int]],
        sources: dict[int, list[int]],
        number: int,
        part: int,
        width: int,
        filled: int,
    ) -> Tensor:
        """(B, heads, filled, width of a head) of one layer's keys or values."""
        like = rows[0].layers[number][part]
        gathered = like.new_empty(len(rows), like.shape[1], filled, like.shape[3])
        for members in sources.values():
            old = rows[members[0]].layers[number][part]
            shift = torch.tensor([rows[b].first - (width - len(prompts[b])) for b in members])
            # Columns of padding hold anything finite: no token sees them.
            columns = (torch.arange(filled) + shift[:, None]).clamp(0, old.shape[2] - 1)
            at = torch.tensor([rows[b].row for b in members])[:, None]
            gathered[members] = old[at.to(old.device), :, columns.to(old.device)].transpose(1, 2)
        return gathered
