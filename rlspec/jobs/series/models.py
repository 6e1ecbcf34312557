"""The checkpoints of a series as models in memory: what losses and divergences are taken of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlspec.backend import choose_device
from rlspec.errors import CheckpointError, TensorError
from rlspec.io.adapter import Adapter, is_adapter
from rlspec.io.index import CheckpointIndex
from rlspec.io.stream import read_tensor
from rlspec.io.weights import find_tensor
from rlspec.jobs.loading import load_model, model_folder


class Models:
    """The base and the checkpoint at hand, each loaded when it is first asked for.

    Args:
        base: the reference's folder.
        device: "auto", "cpu", "cuda", ...; where models are put.
    """

    def __init__(self, base: Path, device: torch.device | str) -> None:
        self.base = base
        self._device = device
        self._base: Any = None
        self._last: tuple[Path, Any] | None = None

    def load(self, place: Path) -> Any:
        """See :func:`load_checkpoint`; the one loaded before goes."""
        if place == self.base and self._base is not None:
            return self._base
        if self._last is None or self._last[0] != place:
            self._last = None  # before the next takes its room
            self._last = (place, load_checkpoint(place, self.base, choose_device(self._device)))
        return self._last[1]

    def load_base(self) -> Any:
        """The base, which stays beside checkpoints."""
        if self._base is None:
            self._base = self.load(self.base)
            self._last = None
        return self._base

    def drop(self) -> None:
        """Hold none."""
        self._base = self._last = None


def check_loadable(place: Path) -> None:
    """Refuse what :func:`load_checkpoint` could not load, from what lies there; of adapters nothing is said.

    Raises:
        CheckpointError: a file, a folder without config.json, or a checkpoint of torch.distributed.checkpoint.
    """
    if is_adapter(place):
        return
    if place.is_file():
        raise CheckpointError(f"{place}: a file; give the folder with its config.json")
    model_folder(str(place))


def load_checkpoint(place: Path, base: Path, device: torch.device) -> Any:
    """A checkpoint as a causal LM in float32; an adapter as its base with the updates added.

    Raises:
        CheckpointError: transformers cannot load it, or the adapter changes what is no parameter of that model.
    """
    if not is_adapter(place):
        return load_model(place, device).eval()
    model = load_model(base, device).eval()
    add_adapter(model, Adapter.open(place, CheckpointIndex.open(base)))
    return model


@torch.no_grad()
def add_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Add a LoRA adapter's updates to the weights of its base in memory, which nothing of PEFT is needed for.

    A tied embedding or head that the adapter changes is untied first, as PEFT leaves the other alone, unless it keeps
    ties.

    Raises:
        CheckpointError: it changes a tensor that is no parameter of the model, as where transformers fuses experts.
    """
    for name in adapter.changed():
        held = dict(model.named_parameters(remove_duplicate=False))
        try:
            there = find_tensor(name, held, "the model that transformers makes of the base")
        except TensorError as error:
            raise CheckpointError(
                f"{adapter.index.path}: {error}; merge the adapter with PEFT and give the merged folder"
            ) from None
        weight = held[there]
        stored = adapter.saved(name)
        before = weight if stored is None else read_tensor(adapter.index, stored).to(weight)
        after = adapter.add_update(name, 0, before.detach().cpu()).to(weight)
        if adapter.keeps_ties or sum(other is weight for other in held.values()) == 1:
            weight.copy_(after)
            continue
        module, _, leaf = there.rpartition(".")
        model.get_submodule(module).register_parameter(leaf, nn.Parameter(after, requires_grad=False))
