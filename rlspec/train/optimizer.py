"""AdamW with a learning rate set by step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlspec.errors import TensorError


def make_adamw(groups: list[tuple[nn.Module, float]], weight_decay: float) -> torch.optim.AdamW:
    """Optimizer over (module, peak learning rate) groups; the peak is kept in the group as ``peak``."""
    parameters: list[dict[str, Any]] = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": peak, "peak": peak}
        for module, peak in groups
    ]
    every = [p for group in parameters for p in group["params"]]
    coarse = {p.dtype for p in every} - {torch.float32, torch.float64}
    if coarse:
        warnings.warn(
            f"training {sorted(map(str, coarse))} weights directly: updates below their rounding step are"
            " lost; load the model in float32 and let autocast save the time",
            stacklevel=3,
        )
    fused = all(p.device.type in ("cpu", "cuda") for p in every)
    return torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=fused)


def set_share(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], max_norm: float, where: str
) -> float:
    """Step along the gradients, clipped to ``max_norm`` together; the norm that they had before.

    Args:
        where: the stage and step, for the error.

    Raises:
        TensorError: the norm is not finite; the weights are as they were.
    """
    # Waits for the device before the step, not after it: a step along NaN cannot be taken back.
    norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
    finite = math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not finite:
        raise TensorError(f"{where}: the norm of the gradients is {norm}; lower the learning rate")
    return norm
