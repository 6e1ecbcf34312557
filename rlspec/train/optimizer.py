"""AdamW with a learning rate set by step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn


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
