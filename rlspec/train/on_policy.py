"""The check that the sampler and the loss speak of the same distribution.

Before the first optimizer step of an update the policy is the one that was sampled from, so every ratio is 1
but for rounding. Log-probabilities stored under another temperature, a skipped token or a shifted mask all
break that, and would otherwise bias the training without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.errors import RlspecError
from rlspec.train.config import PPOConfig

# What one token's log-probability may differ by between a cached and a full forward pass. float32: logits of
# size 30 are rounded at 2e-6, through a few dozen layers. bf16: such logits are rounded at 0.06-0.12.
TOKEN_ROUNDING = {"float32": 1e-4, "bf16": 0.2}


class OnPolicyError(RlspecError):
    """The stored log-probabilities of sampled answers are not those the model gives them."""


def check_on_policy(log_ratio: Tensor, tokens: Tensor, config: PPOConfig) -> float:
    """Largest ``|ratio - 1|`` of actions that no update has touched yet.

    Args:
        log_ratio: (S,) new minus stored log-probability of each action.
        tokens: (S,) tokens of each action; independent rounding errors add up like their square root.

    Raises:
        OnPolicyError: a ratio differs from 1 by more than rounding.
    """
    half = config.dtype == "bf16" or (config.dtype == "auto" and log_ratio.is_cuda)
    rounding = TOKEN_ROUNDING["bf16" if half else "float32"] / min(1.0, config.temperature)
    excess = (log_ratio.abs() / (rounding * tokens.sqrt())).float()
    # A token on the edge of the nucleus may fall to the other side by rounding; that concerns few actions.
    worst = torch.quantile(excess, 1.0 if config.top_p >= 1 else 0.9).item()
    deviation = (log_ratio.exp() - 1).abs().max().item()
    if not worst <= 1.0:
        raise OnPolicyError(
            f"the importance ratio before the first update is off 1 by {deviation:.3g}, {worst:.3g} times"
            " what rounding explains: answers were not sampled from the distribution the loss assumes"
        )
    return deviation
