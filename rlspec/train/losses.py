"""The losses of PPO (Schulman et al. 2017, arXiv 1707.06347), per action and not yet averaged."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_losses(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Clipped surrogate, negated: -min(r A, clamp(r, 1-clip, 1+clip) A), r = exp(log_ratio). Any shape."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Clipped squared error: half the larger of the errors of the value and of the value kept within ``clip``
    of what it was at sampling time. Any shape.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def kl_estimates(log_ratio: Tensor) -> Tensor:
    """r - 1 - log r >= 0, whose mean over sampled actions estimates KL(old || new) without bias."""
    return log_ratio.exp() - 1 - log_ratio
