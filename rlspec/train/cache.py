"""Reading a batch step by step, with whatever a model remembers between steps.

    attention      keys and values: ``past_key_values``
    hybrid         the same object, some or all of whose layers also hold convolution and recurrent states
    recurrent      states alone: ``past_key_values`` or, in Mamba's family, ``cache_params``
    none of these  the whole sequence is read again at every step

Axes: B rows, L columns read so far, N new columns, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlspec.train.batch import accepts, position_ids

#: What models call their memory, as an argument and in their output.
MEMORIES = ("past_key_values", "cache_params")


class Reader:
    """A model at work on one batch. Columns that the mask hides are read, and must not matter."""

    def __init__(self, model: Any, mask: Tensor, cache: DynamicCache | None = None) -> None:
        """``mask``: int64 (B, every column there will be), 0 on padding. ``cache``: keys and values of the first
        columns, which were read before.
        """
        self._model = model
        self._mask = mask
        self._positions = position_ids(mask) if accepts(model, "position_ids") else None
        self._options: dict[str, Any] = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
        self.end = 0 if cache is None else cache.get_seq_length()  # columns read
        self._read = mask.new_empty(len(mask), 0)  # their ids, as long as nothing remembers them
        self._memory: str | None = None if cache is None else "past_key_values"
        self._cache: Any = cache

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, V) that follow the next columns, int64 (B, N), of the batch."""
        first = self.end == 0
        self.end += ids.shape[1]
        if self._memory is None:
            self._read = ids = torch.cat([self._read, ids], dim=1)
        options = dict(self._options)
        if self._positions is not None:
            options["position_ids"] = self._positions[:, self.end - ids.shape[1] : self.end]
        # Mamba takes a mask of the columns it is given, and later ones are never padding.
        if first or self._memory != "cache_params":
            options["attention_mask"] = self._mask[:, : self.end]
        if self._memory is not None:
            options[self._memory] = self._cache
        output = self._model(ids, use_cache=first or self._memory is not None, **options)
        if first:
            self._memory = next((name for name in MEMORIES if self._remembers(output, name)), None)
        if self._memory is not None:
            self._cache = getattr(output, self._memory)
        return output.logits[:, -1]

    def _remembers(self, output: Any, name: str) -> bool:
        return getattr(output, name, None) is not None and accepts(self._model, name)

    def layers(self) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values, (B, heads, L, width) each, of every layer; None where the model's memory is, or may
        be, more than these: states, or a window's last columns.
        """
        layers = getattr(self._cache, "layers", None) if type(self._cache) is DynamicCache else None
        if not layers or any(
            type(layer).__name__ != "DynamicLayer" or layer.keys is None for layer in layers
        ):
            return None
        return [(layer.keys, layer.values) for layer in layers]

    def keep(self, rows: Tensor) -> bool:
        """Go on with these rows, int64 (fewer,), alone; False where the model's memory allows no such thing."""
        if self._memory is None:
            self._read = self._read[rows]
        elif not keep_rows(self._cache, rows):
            return False
        self._mask = self._mask[rows]
        if self._positions is not None:
            self._positions = self._positions[rows]
        return True


def keep_rows(cache: Any, rows: Tensor) -> bool:
    """Keep these rows of a cache, in place; False, and nothing done, where a part of it cannot drop rows."""
    # Other classes hold more than their layers, and the selection they inherit or define may miss some of it.
    layers: list[Any] | None = getattr(cache, "layers", None) if type(cache) is DynamicCache else None
    if layers is None:
        return False
    # Layers with states beside keys and values select those in `reorder_cache` only: made for beams, it takes
    # any list of rows.
    states = any(hasattr(layer, "recurrent_states") for layer in layers)
    select = "reorder_cache" if states else "batch_select_indices"
    if not all(hasattr(layer, select) for layer in layers):
        return False
    for layer in layers:
        getattr(layer, select)(rows)
    return True
