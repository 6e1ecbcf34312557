"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438)."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, discounts: Tensor, lam: float) -> Tensor:
    """Advantages of consecutive steps, possibly of several episodes one after the other.

        delta_t     = r_t + d_t V_{t+1} - V_t
        advantage_t = delta_t + d_t lam advantage_{t+1}

    Args:
        rewards, values: (S,).
        discounts: (S,), what a step's future counts for: gamma within an episode, 0 in an episode's last
            step, which is what keeps episodes apart.
        lam: 0 trusts the values, 1 the rewards.

    Returns:
        float64 (S,). Advantage plus value is the target of the value function.
    """
    steps = zip(rewards.tolist(), values.tolist(), discounts.tolist())
    advantages: list[float] = []
    advantage = next_value = 0.0
    for reward, value, discount in reversed(list(steps)):
        delta = reward + discount * next_value - value
        advantage = delta + discount * lam * advantage
        next_value = value
        advantages.append(advantage)
    return torch.tensor(advantages[::-1], dtype=torch.float64)
