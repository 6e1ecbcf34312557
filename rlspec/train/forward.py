"""The forward passes that losses are made of: logits of every answer token of some traces.

Traces are packed where the model's attention allows it (:mod:`rlspec.train.packing`); otherwise each has a row
of its own, padded (:mod:`rlspec.train.batch`).

Axes: S answer tokens of the traces, in order; V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlspec.train.batch import answer_forward, collate, split_by_length
from rlspec.train.limits import check_length
from rlspec.train.packing import can_pack, packed_forward
from rlspec.train.padding import padding_is_inert
from rlspec.train.traces import Trace


def answer_tokens(traces: Sequence[Trace], device: Any) -> Tensor:
    """The answer tokens, int64 (S,)."""
    ids = [trace.ids[first:end] for trace in traces for first, end in trace.answers]
    return torch.tensor([token for answer in ids for token in answer], device=device)


def answer_logits(
    model: Any, traces: Sequence[Trace], pad: int, *, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits (S, V) that predict each answer token and, if asked for, the last hidden states (S, H) they are
    computed from.

    Raises:
        OptionError: a trace is longer than the model's table of positions.
    """
    longest = max(len(trace.ids) for trace in traces)
    check_length(model, longest)
    if can_pack(model, pad, longest):
        return packed_forward(model, traces, pad)
    batch = collate([trace.pair for trace in traces], pad, next(model.parameters()).device)
    logits, states = answer_forward(model, batch, hidden=hidden)
    rows = [row for row, trace in enumerate(traces) for _ in range(trace.answer_tokens)]
    columns = [
        position - trace.answers[0][0]
        for trace in traces
        for first, end in trace.answers
        for position in range(first, end)
    ]
    return logits[rows, columns], None if states is None else states[rows, columns]


def forward_passes(model: Any, traces: Sequence[Trace], most: int, pad: int) -> list[list[int]]:
    """Numbers of the traces of each forward pass, at most ``most`` a pass: neighbours in the dictionary where
    they are packed, for those have most in common; else of about the same length, and with equal first prompts
    where the model sees padding.
    """
    if can_pack(model, pad, max(len(trace.ids) for trace in traces)):
        order = sorted(range(len(traces)), key=lambda i: traces[i].ids)
        return [order[i : i + most] for i in range(0, len(order), most)]
    pairs = [trace.pair for trace in traces]
    if len({len(prompt) for prompt, _ in pairs}) > 1 and not padding_is_inert(model, pad):
        return split_by_length(pairs, most, stretch=1.0)
    return split_by_length([(trace.ids, []) for trace in traces], most)
