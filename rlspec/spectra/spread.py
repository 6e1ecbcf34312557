"""Models of which each process of a training holds a part: DTensors of FSDP2 or tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn


def is_spread(model: nn.Module) -> bool:
    """Whether only all processes together can put a model's weights in one piece; the same in all of them.

    FSDP2 may leave weights whole after a forward pass without a backward pass, until it next lets go of them; they are
    spread all the same.
    """
    tensors: Any = model.parameters()
    return any(hasattr(tensor, "full_tensor") for tensor in tensors) or bool(sharded_modules(model))


def in_pieces(model: nn.Module) -> nn.Module:
    """The same model, of which FSDP2 has let go of what it keeps whole: its parameters are those that optimizers know.

    To be called between passes, before the weights are read: what reads them gathers them itself.
    """
    for module in sharded_modules(model).values():
        module.reshard()
    return model


def sharded_modules(model: nn.Module) -> dict[str, Any]:
    """Those that FSDP2 gathers and lets go of by themselves, by name."""
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    from torch.distributed.fsdp import FSDPModule

    return {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
