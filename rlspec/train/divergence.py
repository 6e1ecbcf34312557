"""KL divergence of next-token distributions, from logits of two models at the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlspec.errors import OptionError
from rlspec.train.forward import answer_logits
from rlspec.train.modes import evaluation_mode
from rlspec.train.traces import Trace

_TOKENS = 64  # whose vocabularies are held in float64 at once


def divergence_sum(base: Tensor, other: Tensor) -> float:
    """Sum over tokens of KL(base || other) in nats, exact over the vocabulary, in float64 on the second's device.

    Args:
        base: (tokens, V) logits or log-probabilities, of any floating dtype.
        other: (tokens, V'), V' >= V; the base gives what it does not have no probability.
    """
    total = 0.0
    for p, q in zip(base.split(_TOKENS), other.split(_TOKENS)):
        log_p = torch.log_softmax(p.to(q.device).double(), dim=-1)
        log_q = torch.log_softmax(q.double(), dim=-1)
        more = log_q[:, log_p.shape[1] :].exp().sum()
        log_q = log_q[:, : log_p.shape[1]]
        # p log(p/q) - p + q is never negative and sums to the divergence: what rounding does to the normalisers, which
        # would drown a small divergence, cancels to first order.
        total += ((log_p.exp() * (log_p - log_q) - log_p.exp() + log_q.exp()).sum() + more).item()
    return total


@torch.no_grad()
def trace_divergences(base: Any, model: Any, traces: Sequence[Trace], pad: int) -> list[float]:
    """KL(base || model) of each trace, so scaled that their mean is the mean over all answer tokens, in nats per token.

    Element i is the sum over trace i's answer tokens divided by the mean number of answer tokens of a trace. One trace at
    a time, in eval mode.

    Args:
        base, model: causal LMs of one tokenizer, in memory both.

    Raises:
        OptionError: the model has fewer tokens than the base, or a trace is longer than a table of positions.
    """
    sums = []
    with evaluation_mode(base), evaluation_mode(model):
        for trace in traces:
            (p, _), (q, _) = (answer_logits(one, [trace], pad) for one in (base, model))
            if q.shape[1] < p.shape[1]:
                raise OptionError(
                    f"KL to the base: the model has logits of {q.shape[1]} tokens, its base of {p.shape[1]}; wanted a "
                    "model of the base's vocabulary"
                )
            sums.append(divergence_sum(p, q))
    tokens = sum(trace.answer_tokens for trace in traces)
    return [total * len(traces) / tokens for total in sums]
