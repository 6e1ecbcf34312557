"""Forward passes between two steps of a training, through a model that several processes may hold in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from rlspec.spectra.dealt import is_spread


def passes_in_step(model: nn.Module) -> bool:
    """Whether a forward pass is one that all processes must join, in the same order."""
    return is_spread(model) or bool(_sharded_modules(model))


@contextmanager
def in_pieces_again(model: nn.Module) -> Iterator[None]:
    """Context after which FSDP2 has the parameters in the pieces that optimizers know.

    After a forward pass its root keeps them whole for the backward pass, which never comes here; zero_grad of the model
    would then miss the gradients of the pieces. A pass that fails leaves all of them in the middle of it.
    """
    sharded = _sharded_modules(model)
    try:
        yield
    except BaseException:
        for name, module in sharded.items():
            outermost = not any(
                other == "" or name.startswith(f"{other}.") for other in sharded if other != name
            )
            if outermost and hasattr(module, "reset_iter_state"):  # as of torch 2.13
                module.reset_iter_state()
        raise
    finally:
        for module in sharded.values():
            module.reshard()


def _sharded_modules(model: nn.Module) -> dict[str, Any]:
    """Those that FSDP2 gathers and lets go of by themselves, by name."""
    if not dist.is_available():
        return {}
    from torch.distributed.fsdp import FSDPModule

    return {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
