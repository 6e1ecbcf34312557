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
from torch import Tensor

from rlspec.train.batch import left_pad
from rlspec.train.cache import Reader
from rlspec.train.modes import evaluation_mode

#: A short prompt, so that little dilutes the padding, and more padding than a convolution is wide.
_PROMPT, _PADDING = 4, 8

# A matter of the architecture, not of the weights: measured once a model. Inert, and goes on.
_measured: WeakKeyDictionary[Any, tuple[bool, bool]] = WeakKeyDictionary()


def padding_is_inert(model: Any, pad: int) -> bool:
    """Whether left padding leaves a model's logits as they are, read whole and read in steps.

    One prompt is read by itself and behind padding. The logits may differ by the root of the weights' rounding
    unit relative to the largest: far above rounding, far below what padding does to so short a prompt. (TF32
    or bf16 arithmetic can make the answer False without need, which costs time only.)
    """
    return _measured_of(model, pad)[0]


def goes_on(model: Any, pad: int) -> bool:
    """Whether a model also reads several tokens at once behind a cache: a conversation's next turn."""
    settings = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # These turn all keys anew once a sequence has grown past some length.
    if isinstance(settings, dict) and settings.get("rope_type") in ("dynamic", "longrope"):
        return False
    return all(_measured_of(model, pad))


def _measured_of(model: Any, pad: int) -> tuple[bool, bool]:
    if model not in _measured:
        _measured[model] = _measure(model, pad)
    return _measured[model]


@torch.no_grad()
def _measure(model: Any, pad: int) -> tuple[bool, bool]:
    device = next(model.parameters()).device
    rows = model.get_input_embeddings().weight.shape[0]
    # Real tokens other than the one that pads, so that the two can be told apart.
    prompt = [(pad + 1 + i) % rows for i in range(_PROMPT)]
    padded, mask = (part.to(device) for part in left_pad([[pad] * _PADDING + prompt], pad))
    mask[:, :_PADDING] = 0
    with evaluation_mode(model), torch.autocast(device.type, enabled=False):
        alone = Reader(model, mask[:, _PADDING:]).logits(padded[:, _PADDING:])
        whole = Reader(model, mask).logits(padded)
        stepped, pieces = (_in_pieces(Reader(model, mask), padded, last) for last in (1, 2))
    bound = torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max()
    # Nothing can be told from logits that are all zero.
    if not bound > 0:
        return False, False
    same = [
        other is not None and bool(((other - alone).abs() <= bound).all())
        for other in (whole, stepped, pieces)
    ]
    return same[0] and same[1], same[2]


def _in_pieces(reader: Reader, ids: Tensor, last: int) -> Tensor | None:
    """Logits after the last columns, read at once behind the others; None for several behind more than keys and
    values, which not every model's code can do.
    """
    reader.logits(ids[:, :-last])
    return None if last > 1 and reader.layers() is None else reader.logits(ids[:, -last:])


def prompt_batches(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> list[list[int]]:
    """Row numbers of the batches that prompts are read in: one of all, in their order, or one of each length
    where the model sees padding.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) == 1 or padding_is_inert(model, pad):
        return [list(range(len(prompts)))]
    return [[row for row, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
