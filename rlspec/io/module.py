"""The weights of a module in memory under the names of the model alone, whatever a trainer wrapped around it.

Undone are DistributedDataParallel, FSDP, torch.compile and activation checkpointing (of the whole model and of single
layers), PEFT's adapters, and accelerate's offloading. None of those packages is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlspec.backend import device_problem
from rlspec.errors import TensorError
from rlspec.io.fused import Config
from rlspec.io.projections import text_config

# What wrappers put into names: in front ("module" may be a name inside), and anywhere.
_IN_FRONT = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ANYWHERE = _IN_FRONT[1:]
_PEFT = ("base_model", "model")
_FSDP = "_fsdp_wrapped_module"


def strip_wrappers(name: str) -> str:
    """A tensor's name without what wrappers such as DistributedDataParallel and torch.compile put into it."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _IN_FRONT:
        parts.pop(0)
    return ".".join(part for part in parts if part not in _ANYWHERE)


def module_config(module: nn.Module) -> Config | None:
    """What a Hugging Face model knows of itself, also inside wrappers; None where two models in it disagree."""
    found: list[Config] = []
    _collect_configs(module, found)
    return found[0] if found and all(config == found[0] for config in found) else None


def module_device(module: nn.Module) -> torch.device:
    """Where we compute with a module's weights: where its first one is, or on the CPU if we do not compute there."""
    held = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    first = next(held, torch.device("cpu"))
    return first if device_problem(first) is None else torch.device("cpu")


def _collect_configs(module: nn.Module, found: list[Config]) -> None:
    """The configurations of the outermost modules that have one."""
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        found.append(text_config(config.to_dict()))
        return
    for child in module.children():
        _collect_configs(child, found)


class ModuleTensors:
    """The tensors of a module by their plain names, and what PEFT adds to them.

    Args:
        module: any.
        tensors: its parameters or its state, by the names that the module gives them.

    Raises:
        TensorError: the parameters are partitioned by DeepSpeed's ZeRO.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Any]) -> None:
        self._owners: dict[str, nn.Module] = {}
        self._adapters: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        for path, owner in module.named_modules(remove_duplicate=False):
            path = strip_wrappers(path) if path else ""
            self._owners[path] = owner
            if "base_layer" in owner._modules and hasattr(owner, "merged_adapters"):
                self._adapters[path] = owner
            if "original_module" in owner._modules and hasattr(owner, "modules_to_save"):
                self._saved[path] = owner
        self.tensors: dict[str, Tensor] = {}
        self._full_names: dict[str, str] = {}
        for name, parameter in module.named_parameters():
            if hasattr(parameter, "ds_shape") and parameter.numel() == 0:
                raise TensorError(
                    f"{strip_wrappers(name)}: partitioned over processes by DeepSpeed's ZeRO; gather it first "
                    "(deepspeed.zero.GatheredParameters)"
                )
        self.is_fsdp = any(_FSDP in name.split(".") for name, _ in module.named_parameters())
        for full, tensor in tensors.items():
            path = strip_wrappers(full)
            plain = self._plain(path)
            if plain is not None and isinstance(tensor, Tensor):
                self.tensors[plain] = tensor
                self._full_names[plain] = path

    def _plain(self, full: str) -> str | None:
        """The name that the tensor has in the model alone; None for what is an adapter's own, or not in use."""
        parts = full.split(".")
        plain: list[str] = []
        skipped = 0
        for at, part in enumerate(parts):
            if skipped > 0:
                skipped -= 1
                continue
            above = ".".join(parts[:at])
            if above in self._adapters:
                if part != "base_layer":
                    return None
            elif above in self._saved:
                active = _active_copy(self._saved[above])
                wanted = ["original_module"] if active is None else ["modules_to_save", active]
                if parts[at : at + len(wanted)] != wanted:
                    return None
                skipped = len(wanted) - 1
            elif not (part == "token_adapter" and f"{above}.{part}" in self._adapters):
                plain.append(part)
        if tuple(plain[:2]) == _PEFT and len(plain) > 2:
            plain = plain[2:]
        return ".".join(plain)

    def adapter(self, name: str) -> Any:
        """The PEFT layer that changes a weight, with its adapters merged into it or not; None where none does."""
        parts = self._full_names[name].split(".")
        for end in range(len(parts) - 1, 0, -1):
            layer = self._adapters.get(".".join(parts[:end]))
            if layer is not None:
                return layer
        return None

    @property
    def is_adapted(self) -> bool:
        """Whether there are PEFT layers at all."""
        return bool(self._adapters)

    def value(self, name: str) -> Tensor:
        """The tensor as it is held, detached; that of an offloaded one from where it was put.

        Raises:
            TensorError: it has no values.
        """
        tensor = gathered(self.tensors[name].detach())
        if not tensor.is_meta:
            return tensor
        owner, _, local = self._full_names[name].rpartition(".")
        hook = getattr(self._owners.get(owner), "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            offloaded = getattr(one, "weights_map", None)
            if offloaded is not None and local in offloaded:
                return torch.as_tensor(offloaded[local])
        raise TensorError(f"{name}: on the meta device, it has no values; load the weights first")


def gathered(tensor: Any) -> Tensor:
    """The whole of a DTensor of FSDP2 or tensor parallelism; any other tensor as it is.

    What FSDP2 has offloaded to the host goes to its mesh's device first: NCCL gathers from GPUs alone.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    kind = tensor.device_mesh.device_type
    return (tensor if tensor.device.type == kind else tensor.to(kind)).full_tensor()


def _active_copy(wrapper: Any) -> str | None:
    """The adapter whose copy of a module that is trained whole is in use; None for the original."""
    active = [] if wrapper.disable_adapters else list(wrapper.active_adapters)
    return active[0] if active and active[0] in wrapper.modules_to_save else None


def unmerged_adapters(layer: Any) -> list[str]:
    """The adapters that a PEFT layer applies beside its weight, not merged into it."""
    if layer.merged_adapters or layer.disable_adapters:
        return []
    held = [getattr(layer, container, ()) for container in layer.adapter_layer_names]
    return [adapter for adapter in layer.active_adapters if any(adapter in names for names in held)]


def with_adapters(name: str, layer: Any, weight: Tensor) -> Tensor:
    """The weight that a PEFT layer's output comes from: W, or W + sum of scale B A over its active LoRA adapters.

    Args:
        name: what messages call the weight.
        layer: PEFT's, see `ModuleTensors.adapter`.
        weight: as the layer holds it.

    Returns:
        ``weight`` itself where nothing is added, else a new tensor, float32 or wider.

    Raises:
        TensorError: adapters of another kind, which no sum expresses.
    """
    if layer.merged_adapters and layer.disable_adapters:
        raise TensorError(
            f"{name}: its adapters are merged and disabled at once; call unmerge_adapter() first"
        )
    active = unmerged_adapters(layer)
    if not active:
        return weight
    kind = type(layer).__name__
    special = [adapter for adapter in active if _is_special(layer, adapter)]
    if (
        special
        or getattr(layer, "parameter_name", "weight") != "weight"
        or hasattr(layer.base_layer, "base_layer")
    ):
        raise TensorError(
            f"{name}: an adapter of PEFT ({kind}) is in the way, which is more than a sum of W and B A: a "
            "trainer's callback cannot track it, merge and measure the checkpoints; in a loop of your own call "
            "merge_adapter() before and unmerge_adapter() after"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for adapter in active:
        update = gathered(layer.get_delta_weight(adapter).detach())
        total = total + update.to(total)
    return total


def adds_lora(layer: Any) -> bool:
    """Whether all that a PEFT layer does to its weight is to add what :func:`lora_terms` tells."""
    kind = type(layer)
    if kind.__name__ not in ("Linear", "Embedding") or kind.__module__ != "peft.tuners.lora.layer":
        return False
    active = unmerged_adapters(layer)
    if not active or layer.merged_adapters or any(_is_special(layer, adapter) for adapter in active):
        return False
    return getattr(layer, "parameter_name", "weight") == "weight" and not hasattr(
        layer.base_layer, "base_layer"
    )


def lora_terms(layer: Any) -> list[tuple[Tensor, Tensor, float]]:
    """What a LoRA layer of PEFT adds to its weight, where :func:`adds_lora`.

    Returns:
        (left, right, scale) of each active adapter; ``scale * left @ right`` has the shape that the weight is stored in.
    """
    embeds = type(layer).__name__ == "Embedding"
    terms = []
    for adapter in unmerged_adapters(layer):
        if embeds:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        a, b = gathered(a.detach()), gathered(b.detach())
        left, right = (a.mT, b.mT) if embeds or layer.fan_in_fan_out else (b, a)
        terms.append((left, right, float(layer.scaling[adapter])))
    return terms


def _is_special(layer: Any, adapter: str) -> bool:
    """Whether an adapter is more than scale B A: DoRA and its kin, or no LoRA at all."""
    factors = (getattr(layer, "lora_A", ()), getattr(layer, "lora_embedding_A", ()))
    if not any(adapter in names for names in factors) or not hasattr(layer, "get_delta_weight"):
        return True
    dora = getattr(layer, "use_dora", {})  # PEFT before 0.16
    return adapter in getattr(layer, "lora_variant", ()) or (
        isinstance(dora, dict) and bool(dora.get(adapter))
    )
