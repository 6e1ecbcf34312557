"""Whether a model may be given prompts of unequal length in one batch, and how to batch them if not.

Attention hides padding exactly. Recurrent and convolution layers see it unless their code masks it, which
some of transformers' models do, some do only without biases, and some not at all; then the answer depends on
the company that a prompt happens to be in. No list of names tells which: it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rlspec.train.batch import left_pad, split_by_length
from rlspec.train.cache import Reader
from rlspec.train.modes import evaluation_mode

#: A short prompt, so that little dilutes the padding, and more padding than a convolution is wide.
_PROMPT, _PADDING = 4, 8

# A matter of the architecture, not of the weights: measured once a model.
_measured: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def padding_is_inert(model: Any, pad: int) -> bool:
    """Whether left padding leaves a model's logits as they are, read whole and read in steps.

    One prompt is read by itself and behind padding. The logits may differ by the root of the weights' rounding
    unit relative to the largest: far above rounding, far below what padding does to so short a prompt. (TF32
    or bf16 arithmetic can make the answer False without need, which costs time only.)
    """
    if model not in _measured:
        _measured[model] = _measure(model, pad)
    return _measured[model]


@torch.no_grad()
def _measure(model: Any, pad: int) -> bool:
    device = next(model.parameters()).device
    rows = model.get_input_embeddings().weight.shape[0]
    # Real tokens other than the one that pads, so that the two can be told apart.
    prompt = [(pad + 1 + i) % rows for i in range(_PROMPT)]
    padded, mask = (part.to(device) for part in left_pad([[pad] * _PADDING + prompt], pad))
    mask[:, :_PADDING] = 0
    with evaluation_mode(model), torch.autocast(device.type, enabled=False):
        alone = Reader(model, mask[:, _PADDING:]).logits(padded[:, _PADDING:])
        reader = Reader(model, mask)
        whole = Reader(model, mask).logits(padded)
        reader.logits(padded[:, :-1])
        stepped = reader.logits(padded[:, -1:])
    bound = torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max()
    # Nothing can be told from logits that are all zero.
    return bool(bound > 0) and all(bool(((other - alone).abs() <= bound).all()) for other in (whole, stepped))


def prompt_batches(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> list[list[int]]:
    """Row numbers of the batches that prompts are read in: one of all, in their order, or one of each length
    where the model sees padding.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) == 1 or padding_is_inert(model, pad):
        return [list(range(len(prompts)))]
    return [[row for row, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]


def forward_passes(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], most: int, pad: int
) -> list[list[int]]:
    """Rows of the forward passes of a batch of (prompt ids, answer ids), at most ``most`` rows each:
    :func:`rlspec.train.batch.split_by_length`, with prompts of equal length where the model sees padding.
    """
    equal = len({len(prompt) for prompt, _ in pairs}) > 1 and not padding_is_inert(model, pad)
    return split_by_length(pairs, most, stretch=1.0 if equal else 1.5)
