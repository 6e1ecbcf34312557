"""The losses of SFT, per token, and of PPO (Schulman et al. 2017, arXiv 1707.06347), per action; not yet averaged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_losses(logits: Tensor, tokens: Tensor, kind: str) -> Tensor:
    """-log p of each token (S,) under logits (S, V); ``dft`` (Wu et al. 2025, arXiv 2508.05629) weighs it by p, through
    which no gradient goes.
    """
    losses = F.cross_entropy(logits, tokens, reduction="none")
    return losses * torch.exp(-losses.detach()) if kind == "dft" else losses


def divergences(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(model || reference) in nats of each row (S,), exact over the vocabulary, of two tensors of logits (S, V)."""
    own, other = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    return (own.exp() * (own - other)).sum(-1)


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
