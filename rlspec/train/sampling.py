"""The distribution that answers are sampled from, written once for the sampler and for PPO."""

from __future__ import annotations

import torch
from torch import Tensor


def sampling_logprobs(
    logits: Tensor, temperature: float, top_p: float = 1.0, keep: Tensor | None = None
) -> Tensor:
    """Log-probabilities, float32 (…, V), of logits (…, V) after temperature and nucleus truncation.

    The nucleus is the smallest set of most probable tokens that holds at least ``top_p``; everything else
    becomes -inf and the rest is renormalised. ``keep`` (…,) int64 names one token per position that stays
    whatever its rank: a token that was sampled must keep a finite log-probability when it is evaluated again.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_p >= 1.0:
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    if keep is not None:
        dropped = dropped.scatter(-1, keep[..., None], False)
    return torch.log_softmax(logprobs.masked_fill(dropped, -torch.inf), dim=-1)


def choose(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens, int64 (B,), drawn by inverting the distribution function of logprobs (B, V) at uniforms (B,).

    One uniform number decides one token, so two models that are given the same numbers are compared on the
    same luck. float64 sums keep a token of probability zero from ever being chosen. Of a row of NaN the token is one
    that exists, and its log-probability tells.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    points = uniforms.double() * cumulative[:, -1]
    found = torch.searchsorted(cumulative, points[:, None], right=True)[:, 0]
    return found.clamp_max(logprobs.shape[-1] - 1)  # past the last one, CUDA would abort the process


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Log-probabilities, float32 (B, T), that the sampling distribution gives to tokens (B, T)."""
    logprobs = sampling_logprobs(logits, temperature, top_p, keep=tokens)
    return logprobs.gather(-1, tokens[..., None])[..., 0]
