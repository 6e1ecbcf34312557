"""One layout for every forward pass: prompts padded on the left, answers padded on the right.

    prompt  . . p p p | a a a .        P columns | T columns
                    ^ the last prompt column predicts the first answer token

All prompts thus end in the same column, so the logits and hidden states that matter to an answer are the
columns P-1 … P+T-2 of every row, and the output head need not run on the prompt.

Axes: B rows, P prompt columns, T answer columns, V vocabulary, H hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlspec.train.limits import check_length


@dataclass(frozen=True)
class AnswerBatch:
    """Prompts and answers of a batch; see the module's drawing."""

    input_ids: Tensor  # (B, P+T) int64
    attention_mask: Tensor  # (B, P+T) int64, 0 on padding
    answers: Tensor  # (B, T) int64
    answer_mask: Tensor  # (B, T) bool, True on answer tokens
    longest: int  # tokens of the longest row


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 (B, P), of prompts padded on the left to the longest."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(width) >= width - lengths[:, None]
    return ids, mask.long()


def collate(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, device: Any) -> AnswerBatch:
    """Batch of (prompt ids, answer ids) pairs on a device."""
    prompt_ids, prompt_mask = left_pad([prompt for prompt, _ in pairs], pad)
    width = max(len(answer) for _, answer in pairs)
    answers = torch.tensor([list(answer) + [pad] * (width - len(answer)) for _, answer in pairs])
    lengths = torch.tensor([len(answer) for _, answer in pairs])
    answer_mask = torch.arange(width) < lengths[:, None]
    return AnswerBatch(
        input_ids=torch.cat([prompt_ids, answers], dim=1).to(device),
        attention_mask=torch.cat([prompt_mask, answer_mask.long()], dim=1).to(device),
        answers=answers.to(device),
        answer_mask=answer_mask.to(device),
        longest=max(len(prompt) + len(answer) for prompt, answer in pairs),
    )


def split_by_length(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], most: int, *, stretch: float = 1.5
) -> list[list[int]]:
    """Row numbers of the forward passes that a batch is best split into, at most ``most`` rows each.

    Rows are sorted by prompt length, and a pass ends early when the next prompt is over ``stretch`` times as
    long as its shortest: short first turns would otherwise be padded to the length of long conversations, and
    on a small model padding is what the time goes to. At 1.0 no prompt is padded.
    """
    passes: list[list[int]] = []
    shortest = 0
    for row in sorted(range(len(pairs)), key=lambda row: len(pairs[row][0])):
        length = len(pairs[row][0])
        if not passes or len(passes[-1]) == most or length > stretch * shortest:
            passes.append([])
            shortest = length
        passes[-1].append(row)
    return passes


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions, int64 (B, L), that count real tokens only, so left padding shifts nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward takes this argument by name."""
    return argument in inspect.signature(model.forward).parameters


def answer_forward(model: Any, batch: AnswerBatch, *, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
    """Logits (B, T, V) that predict each answer token and, if asked for, the last hidden states (B, T, H)
    they are computed from (what the output head is fed, so any scaling after it is left out).

    Raises:
        OptionError: a row is longer than the model's table of positions.
    """
    check_length(model, batch.longest)
    width = batch.answers.shape[1]
    options: dict[str, Any] = {"use_cache": False}
    if accepts(model, "position_ids"):
        options["position_ids"] = position_ids(batch.attention_mask)
    if accepts(model, "logits_to_keep"):
        options["logits_to_keep"] = width + 1
    with head_inputs(model, hidden) as captured:
        output = model(batch.input_ids, attention_mask=batch.attention_mask, **options)
    # The last column predicts the token after the answer, which nobody asked for.
    logits = output.logits[:, -width - 1 : -1]
    return logits, captured[0][:, -width - 1 : -1] if hidden else None


@contextmanager
def head_inputs(model: Any, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Context whose list gets the hidden states that each forward pass feeds its output head, if ``wanted``."""
    captured: list[Tensor] = []
    if not wanted:
        yield captured
        return
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        hook.remove()


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """Context whose list gets the tokens, padding included, of each forward pass."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: counts.append(inputs[0].numel())
    )
    try:
        yield counts
    finally:
        hook.remove()


def autocast(device: torch.device, dtype: Literal["auto", "float32", "bf16"]) -> torch.autocast:
    """Context of a forward pass: bf16 autocast for "bf16", and for "auto" on a CUDA device; else none."""
    enabled = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
