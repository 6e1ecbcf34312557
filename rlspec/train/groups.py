"""Advantages without a value function: an episode against the others that were played on the same problem."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def group_advantages(returns: Tensor, kind: Literal["grpo", "rloo"]) -> Tensor:
    """Advantages, float64 (P, G), of G episodes on each of P problems, from their returns (P, G).

    ``grpo`` (Shao et al. 2024, arXiv 2402.03300) takes off the group's mean and divides by its standard
    deviation; ``rloo`` (Ahmadian et al. 2024, arXiv 2402.14740) takes off the mean of the other G - 1. Where all
    of a group end alike there is nothing to learn: 0.
    """
    returns = returns.double()
    centred = returns - returns.mean(1, keepdim=True)
    if kind == "rloo":
        # x - (sum - x) / (G - 1) = (x - mean) G / (G - 1)
        count = returns.shape[1]
        return centred * count / (count - 1)
    return centred / (returns.std(1, correction=0, keepdim=True) + 1e-8)
