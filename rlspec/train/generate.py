"""Sampling of answers, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlspec.errors import TensorError
from rlspec.train.batch import autocast, head_inputs, left_pad
from rlspec.train.cache import Reader
from rlspec.train.encode import pad_id, stop_ids
from rlspec.train.limits import check_length
from rlspec.train.memory import Layers, Memory
from rlspec.train.modes import evaluation_mode
from rlspec.train.padding import goes_on, prompt_batches
from rlspec.train.sampling import choose, sampling_logprobs

# Finished rows leave the batch once they are this share of it: dropping them copies the cache.
FINISHED_SHARE = 0.25


@dataclass(frozen=True)
class Generation:
    """Sampled answers, in the prompts' order. An answer holds its end token unless it was cut off."""

    tokens: list[list[int]]
    logprobs: list[list[float]]  # natural logarithms under the distribution sampled from; 0 when greedy
    states: list[Tensor] = field(compare=False)  # (T, H) of each answer: its first tokens', those asked for


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    dtype: Any = "float32",
    states: int = 0,
    memory: Memory | None = None,
    names: Sequence[int] = (),
) -> Generation:
    """Sample one answer per prompt, all prompts in one batch if the model's layers allow padding.

    Args:
        prompts: token ids, at least one a prompt.
        temperature: 0 takes the most probable token.
        generator: CPU generator that ``uniforms`` are drawn from when they are not given.
        uniforms: float (len(prompts), max_new_tokens) in [0, 1): the number that decides each token. A row's
            answer depends on its own numbers only, not on when other rows finish.
        dtype: autocast of the forward passes, see :func:`rlspec.train.batch.autocast`.
        states: of how many first tokens of an answer to return the hidden states that predict them (what the
            output head is fed).
        memory: what was read of the conversations ``names``, one a prompt, before: it is put to use and brought
            up to date, as far as the model's layers allow.

    Raises:
        OptionError: prompt and answer may be longer than the model's table of positions.
        TensorError: what is sampled from is NaN.
    """
    if not prompts:
        return Generation([], [], [])
    check_length(model, max(len(prompt) for prompt in prompts) + max_new_tokens)
    device = next(model.parameters()).device
    if temperature > 0:
        if uniforms is None:
            uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
        uniforms = uniforms.to(device)
    pad = pad_id(model, tokenizer)
    if memory is not None and not goes_on(model, pad):
        memory = None
    sampler = _Sampler(model, tokenizer, len(prompts), max_new_tokens, temperature, top_p, uniforms, states)
    with evaluation_mode(model):
        for batch in prompt_batches(model, prompts, pad):
            ids, mask = left_pad([prompts[row] for row in batch], pad)
            # Generated columns are real for every row still in the batch, so their mask is known beforehand.
            mask = torch.cat([mask, mask.new_ones(len(batch), max_new_tokens)], dim=1)
            cache = None if memory is None else memory.recall(names, prompts)
            ids, rows = ids.to(device), torch.tensor(batch, device=device)
            with autocast(device, dtype):
                reader = Reader(model, mask.to(device), cache)
                left = sampler.run(reader, ids[:, reader.end :], rows, remember=memory is not None)
            if memory is not None:
                drawn = sampler.tokens.tolist()
                for members, layers, end in left:
                    for row, number in enumerate(members):
                        first = ids.shape[1] - len(prompts[number])
                        read = [*prompts[number], *drawn[number][: end - ids.shape[1]]]
                        memory.keep(names[number], layers, row, first, read)
    return sampler.result()


class _Sampler:
    """The answers of all prompts while they grow: tokens and log-probabilities (prompts, steps), hidden states
    (prompts, steps, H) of the first steps.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: int,
        steps: int,
        temperature: float,
        top_p: float,
        uniforms: Tensor | None,
        states: int,
    ) -> None:
        head = model.get_output_embeddings().weight
        device = next(model.parameters()).device
        self._model = model
        self._temperature, self._top_p, self._uniforms = temperature, top_p, uniforms
        self._stops = torch.tensor(stop_ids(model, tokenizer), device=device)
        self.tokens = torch.zeros(prompts, steps, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(prompts, steps, device=device)
        self._states = head.new_zeros(prompts, min(states, steps), head.shape[1])

    def run(
        self, reader: Reader, ids: Tensor, rows: Tensor, *, remember: bool
    ) -> list[tuple[list[int], Layers, int]]:
        """Sample for the prompts ``rows`` (B,), whose ids (B, P) the reader has yet to read. Returns, if it is to
        ``remember``, what the rows had read when they left the batch: their prompts, layers and columns.
        """
        left: list[tuple[list[int], Layers, int]] = []
        finished = torch.zeros_like(rows, dtype=torch.bool)
        steps, watched = self.tokens.shape[1], self._states.shape[1]
        for step in range(steps):
            with head_inputs(self._model, step < watched) as inputs:
                logits = reader.logits(ids)
            if step < watched:
                self._states[rows, step] = inputs[0][:, -1].to(self._states)
            chosen = self._choose(logits, rows, step)
            finished |= torch.isin(chosen, self._stops)
            alive = len(rows) - int(finished.sum())
            if alive == 0 or step == steps - 1:
                break
            if alive <= (1 - FINISHED_SHARE) * len(rows):
                gone, kept = finished.nonzero()[:, 0], (~finished).nonzero()[:, 0]
                before = reader.layers() if remember else None
                if reader.keep(kept):
                    if before is not None:
                        part = [(keys[gone], values[gone]) for keys, values in before]
                        left.append((rows[gone].tolist(), part, reader.end))
                    rows, chosen, finished = rows[kept], chosen[kept], finished[kept]
            ids = chosen[:, None]
        if remember and (layers := reader.layers()) is not None:
            left.append((rows.tolist(), layers, reader.end))
        return left

    def _choose(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """The next token, int64 (B,), after logits (B, V)."""
        if self._temperature > 0:
            scores = sampling_logprobs(logits, self._temperature, self._top_p)
            assert self._uniforms is not None
            chosen = choose(scores, self._uniforms[rows, step])
            self._logprobs[rows, step] = scores.gather(1, chosen[:, None])[:, 0]
        else:
            chosen = logits.argmax(-1)
        self.tokens[rows, step] = chosen
        return chosen

    def result(self) -> Generation:
        """Each answer ended after its first stop token; later columns belong to no one.

        Raises:
            TensorError: a token's log-probability is NaN.
        """
        logprobs = self._logprobs.cpu()  # looked at once and on the host, where they go anyway
        if bool(logprobs.isnan().any()):
            raise TensorError(
                "the model gives NaN probabilities, so no answer can be sampled; its weights are not finite, or its "
                "logits overflow: take a checkpoint from before, or compute in float32"
            )
        stops = set(self._stops.tolist())
        tokens = self.tokens.tolist()
        lengths = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in tokens]
        return Generation(
            [row[:length] for row, length in zip(tokens, lengths)],
            [row[:length] for row, length in zip(logprobs.tolist(), lengths)],
            [row[:length] for row, length in zip(self._states, lengths)],
        )
