"""A LoRA adapter of PEFT as a tuned checkpoint: W_b + scale B A, formed for the rows at hand.

Nothing of PEFT is imported. The folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; with r the
adapter's rank, A is (r, in) and B (out, r), and scale = alpha / r, or alpha / sqrt(r) with ``use_rslora``
(arXiv 2106.09685, 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlspec.errors import CheckpointError
from rlspec.io.counterparts import Names
from rlspec.io.files import read_json_object
from rlspec.io.index import CheckpointIndex
from rlspec.io.projections import conv1d_layer, modules_in
from rlspec.io.stream import read_tensor
from rlspec.io.updates import Update

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_EMBEDDING_FACTOR = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")
_SAVED = re.compile(r"(.+)\.(?:modules_to_save(?:\.default)?|base_layer)\.(weight|bias)")
# Initialisations that subtract something from the base's weights, so that base + B A is not the tuned model.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """The update of one tensor: names of its factors in the adapter's file."""

    a: str
    b: str
    scale: float
    transposed: bool  #: the tensor is stored (in, out): embeddings, GPT-2's Conv1D


class Adapter:
    """What an adapter makes of the tensors of its base."""

    def __init__(
        self,
        index: CheckpointIndex,
        updates: Mapping[str, LowRank],
        replacements: Mapping[str, str],
        keeps_ties: bool = False,
    ) -> None:
        self.index = index
        self.keeps_ties = keeps_ties  #: what it does to a tied embedding it does to the head as well
        self._updates = dict(updates)
        self._replacements = dict(replacements)
        self._factors: tuple[str, Tensor, Tensor] | None = None

    @classmethod
    def open(cls, folder: Path, base: CheckpointIndex) -> Adapter:
        """Read the configuration and the header of an adapter, and find its places in the base.

        Raises:
            CheckpointError: not a LoRA adapter that a sum W_b + scale B A expresses, or one of another base.
        """
        config = _read_config(folder)
        index = CheckpointIndex.open(folder / WEIGHTS_FILE)
        factors: dict[tuple[str, bool], dict[str, str]] = {}
        replacements = {}
        there = Names(base.tensors)
        for stored in index.tensors:
            path = stored.removeprefix(_PREFIX)
            if match := _FACTOR.fullmatch(path):
                factors.setdefault((match[1], False), {})[match[2]] = stored
            elif match := _EMBEDDING_FACTOR.fullmatch(path):
                factors.setdefault((match[1], True), {})[match[2]] = stored
            elif "lora_" in path or "trainable_tokens" in path:
                raise CheckpointError(f"{index.path}: {stored} is of a kind of adapter that is not supported")
            else:
                match = _SAVED.fullmatch(path)
                name = _place(f"{match[1]}.{match[2]}" if match else path, stored, there, base, index)
                _same_shape(name, base, index.tensors[stored].shape, stored, index)
                replacements[name] = stored
        updates = {}
        for (module, embedding), pair in factors.items():
            if set(pair) != {"A", "B"}:
                raise CheckpointError(f"{index.path}: {module} has lora_{next(iter(pair))} alone")
            name = _place(f"{module}.weight", pair["A"], there, base, index)
            updates[name] = _low_rank(name, module, pair, embedding, config, base, index)
        return cls(index, updates, replacements, bool(config.get("ensure_weight_tying")))

    def changes(self, name: str) -> bool:
        """Whether the adapter changes this tensor of the base."""
        return name in self._updates or name in self._replacements

    def changed(self) -> list[str]:
        """The tensors of the base that it changes."""
        return list(dict.fromkeys([*self._replacements, *self._updates]))

    def without(self, name: str) -> Adapter:
        """The same adapter that leaves a tensor of the base as it is."""
        updates = {n: update for n, update in self._updates.items() if n != name}
        replacements = {n: stored for n, stored in self._replacements.items() if n != name}
        return Adapter(self.index, updates, replacements, self.keeps_ties)

    def saved(self, name: str) -> str | None:
        """The adapter's own name of a tensor that it holds whole (a module trained beside the adapter)."""
        return self._replacements.get(name)

    def add_update(self, name: str, first: int, rows: Tensor) -> Tensor:
        """W + scale B A for some rows of a tensor.

        Args:
            name: the base's name of the tensor.
            first: index of the first row.
            rows: (c, ...), the base's, or those of the saved tensor.

        Returns:
            (c, ...): ``rows`` itself where there is no update, else a new tensor in float32 (float64 for float64).
        """
        update = self._updates.get(name)
        if update is None:
            return rows
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        if self._factors is None or self._factors[0] != name:
            self._factors = (name, *self._read_factors(update, wide))
        _, left, right = self._factors
        return torch.addmm(rows.to(wide), left[first : first + len(rows)], right, alpha=update.scale)

    def adds(self, name: str) -> bool:
        """Whether the adapter adds a product of factors to this tensor of the base, or to what it has saved for it."""
        return name in self._updates

    def update(self, name: str) -> Update:
        """scale B A of a tensor that :meth:`adds` to, as it is stored."""
        update = self._updates[name]
        return Update.of([(*self._read_factors(update, torch.float64), update.scale)])

    def _read_factors(self, update: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two factors in the order that makes rows of the left one rows of the stored tensor."""
        a, b = (read_tensor(self.index, factor).to(dtype) for factor in (update.a, update.b))
        return (a.mT, b.mT) if update.transposed else (b, a)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def check_weights(folder: Path) -> None:
    """Refuse an adapter without weights that are read.

    Raises:
        CheckpointError: there are none; the message tells of a pickle.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = f" ({PICKLED_FILE} is a pickle, which is never loaded)"
        hint = pickled if (folder / PICKLED_FILE).exists() else ""
        raise CheckpointError(f"{folder}: no {WEIGHTS_FILE} in it{hint}; save the adapter with safetensors")


def _read_config(folder: Path) -> Mapping[str, Any]:
    """adapter_config.json, after refusing what is not a plain LoRA adapter."""
    path = folder / CONFIG_FILE
    config = read_json_object(path)
    check_weights(folder)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type {config.get('peft_type')!r}; only LORA adapters are supported"
        )
    initialised = str(config.get("init_lora_weights", True)).lower()
    unsupported = {
        "use_dora": "DoRA rescales the merged weight",
        "lora_bias": "biases of B are not supported",
        "target_parameters": "updates of bare parameters are not supported",
        "trainable_token_indices": "single trained tokens are not supported",
        "layer_replication": "replicated layers have no counterpart in the base",
        "alora_invocation_tokens": "an activated adapter cannot be merged",
        "megatron_config": "Megatron's layers are not supported",
    }
    for key, why in unsupported.items():
        if config.get(key):
            raise CheckpointError(
                f"{path}: {key}: {why}; merge the adapter with PEFT and give the merged folder"
            )
    if initialised.startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights {initialised!r} changed the base's weights before training; convert the "
            "adapter with PEFT (save_pretrained with path_initial_model_for_weight_conversion), or merge it"
        )
    return config


def _low_rank(
    name: str,
    module: str,
    pair: Mapping[str, str],
    embedding: bool,
    config: Mapping[str, Any],
    base: CheckpointIndex,
    index: CheckpointIndex,
) -> LowRank:
    a, b = (index.tensors[pair[side]].shape for side in "AB")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise CheckpointError(f"{index.path}: lora_A {a} and lora_B {b} of {module} do not multiply")
    rank = _setting(config, "rank_pattern", "r", module)
    if rank != a[0]:
        raise CheckpointError(f"{index.path}: {module} has rank {a[0]}, {CONFIG_FILE} says {rank:g}")
    alpha = _setting(config, "alpha_pattern", "lora_alpha", module)
    update = (b[0], a[1])
    transposed = embedding or _stored_transposed(name, update, base, config)
    _same_shape(name, base, update[::-1] if transposed else update, f"the update of {module}", index)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(pair["A"], pair["B"], scale, transposed)


def _stored_transposed(
    name: str, update: tuple[int, int], base: CheckpointIndex, config: Mapping[str, Any]
) -> bool:
    """Whether a tensor is stored (in, out), as GPT-2's Conv1D is.

    The shape tells, and for a square one its layer's c_fc, which is always longer. The configuration's flag is that of
    the module that PEFT happened to adapt last, so it decides where nothing else does.
    """
    shape = tuple(base.tensors[name].shape)
    if update[0] != update[1]:
        return shape == update[::-1]
    wider = base.tensors.get(f"{conv1d_layer(name)}mlp.c_fc.weight")
    if wider is not None and len(wider.shape) == 2:
        return wider.shape[0] < wider.shape[1]
    return bool(config.get("fan_in_fan_out"))


def _setting(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """A module's own value where a pattern names it, as PEFT matches them, else the common one."""
    value = config.get(default)
    for pattern, own in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise CheckpointError(f"{CONFIG_FILE}: {default} is {value!r}, expected a positive number")
    return value


def _same_shape(
    name: str, base: CheckpointIndex, shape: Iterable[int], what: str, index: CheckpointIndex
) -> None:
    if tuple(shape) != tuple(base.tensors[name].shape):
        raise CheckpointError(
            f"{index.path}: {what} is {tuple(shape)}, but {name} of {base.path} is {base.tensors[name].shape}; "
            "merge an adapter with resized embeddings with PEFT and give the merged folder"
        )


def _place(path: str, stored: str, there: Names, base: CheckpointIndex, index: CheckpointIndex) -> str:
    """The base's name of a tensor that the adapter calls ``path``."""
    found = there.counterpart(path)
    if found is not None:
        return found
    if "lm_head" in modules_in(path, ()):
        raise CheckpointError(
            f"{index.path}: {stored} trains a head that {base.path} does not store, since it is tied to the embedding; "
            "merge the adapter with PEFT and give the merged folder"
        )
    raise CheckpointError(
        f"{index.path}: {stored} belongs to no tensor of {base.path}: is that the adapter's base model?"
    )
