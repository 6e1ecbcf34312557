"""A LoRA adapter on its base, as weights: W + s B A, or W and the factors apart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlspec.io.adapter import Adapter
from rlspec.io.stream import read_tensor
from rlspec.io.updates import Update
from rlspec.io.weights import CheckpointWeights, Weights


class AdaptedWeights(CheckpointWeights):
    """The weights of a base checkpoint with an adapter's updates, float32 or wider where there is one."""

    def __init__(self, base: Path, adapter: Adapter) -> None:
        super().__init__(base)
        self._adapter = adapter
        self.where = f"the adapter {adapter.index.path.parent} on {base}"

    def on(self, device: torch.device) -> Weights:
        return self  # what adapters add to W is added, or told apart from it, on the host

    def _decoded(self, name: str, stored: Tensor) -> Tensor:
        saved = self._adapter.saved(name)
        return super()._decoded(name, stored) if saved is None else read_tensor(self._adapter.index, saved)

    def _adapted(self, name: str, weight: Tensor) -> Tensor:
        return self._adapter.add_update(name, 0, weight)

    def _adds(self, name: str) -> bool:
        return self._adapter.adds(name)

    def _update(self, name: str) -> Update:
        return self._adapter.update(name)
