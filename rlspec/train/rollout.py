"""Batched sampling, and episodes of several verification turns played with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlspec.train.batch import autocast, left_pad
from rlspec.train.cache import Reader
from rlspec.train.encode import decode_answer, encode_prompt, pad_id, stop_ids
from rlspec.train.limits import check_length
from rlspec.train.modes import evaluation_mode
from rlspec.train.padding import prompt_batches
from rlspec.train.sampling import choose, sampling_logprobs

if TYPE_CHECKING:
    from rlspec.tasks.base import Message, Task, Verdict

# Finished rows leave the batch once they are this share of it: dropping them copies the cache.
FINISHED_SHARE = 0.25


@dataclass(frozen=True)
class Generation:
    """Sampled answers, in the prompts' order. An answer holds its end token unless it was cut off."""

    tokens: list[list[int]]
    logprobs: list[list[float]]  # natural logarithms under the distribution sampled from; 0 when greedy


@dataclass(frozen=True)
class Turn:
    """One answer of an episode and what the verifier said to it."""

    prompt_ids: list[int]
    answer_ids: list[int]
    logprobs: list[float]
    answer: str
    verdict: Verdict


@dataclass
class Episode:
    """Attempts at one problem, until it is solved or the turns are used up."""

    problem: Any
    turns: list[Turn] = field(default_factory=list)

    @property
    def solved(self) -> bool:
        return bool(self.turns) and self.turns[-1].verdict.solved


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
) -> Generation:
    """Sample one answer per prompt, all prompts in one batch if the model's layers allow padding.

    Args:
        prompts: token ids, at least one a prompt.
        temperature: 0 takes the most probable token.
        generator: CPU generator that ``uniforms`` are drawn from when they are not given.
        uniforms: float (len(prompts), max_new_tokens) in [0, 1): the number that decides each token. A row's
            answer depends on its own numbers only, not on when other rows finish.
        dtype: autocast of the forward passes, see :func:`rlspec.train.batch.autocast`.

    Raises:
        OptionError: prompt and answer may be longer than the model's table of positions.
    """
    if not prompts:
        return Generation([], [])
    check_length(model, max(len(prompt) for prompt in prompts) + max_new_tokens)
    device = next(model.parameters()).device
    if temperature > 0:
        if uniforms is None:
            uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
        uniforms = uniforms.to(device)
    pad = pad_id(model, tokenizer)
    stops = torch.tensor(stop_ids(model, tokenizer), device=device)
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(prompts), max_new_tokens, device=device)
    with evaluation_mode(model):
        for batch in prompt_batches(model, prompts, pad):
            ids, mask = left_pad([prompts[row] for row in batch], pad)
            # Generated columns are real for every row still in the batch, so their mask is known beforehand.
            mask = torch.cat([mask, mask.new_ones(len(batch), max_new_tokens)], dim=1)
            ids, rows = ids.to(device), torch.tensor(batch, device=device)
            with autocast(device, dtype):
                reader = Reader(model, mask.to(device))
                _sample(reader, ids, rows, tokens, logprobs, uniforms, stops, temperature, top_p)
    return _cut(tokens.tolist(), logprobs.tolist(), set(stops.tolist()))


def _sample(
    reader: Reader,
    ids: Tensor,
    rows: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    uniforms: Tensor | None,
    stops: Tensor,
    temperature: float,
    top_p: float,
) -> None:
    """Fill ``tokens`` and ``logprobs``, (prompts, steps), of the prompts ``rows`` (B,) whose ids (B, P) are
    given.
    """
    finished = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(tokens.shape[1]):
        logits = reader.logits(ids)
        if temperature > 0:
            scores = sampling_logprobs(logits, temperature, top_p)
            assert uniforms is not None
            chosen = choose(scores, uniforms[rows, step])
            logprobs[rows, step] = scores.gather(1, chosen[:, None])[:, 0]
        else:
            chosen = logits.argmax(-1)
        tokens[rows, step] = chosen
        finished |= torch.isin(chosen, stops)
        alive = len(rows) - int(finished.sum())
        if alive == 0:
            break
        if alive <= (1 - FINISHED_SHARE) * len(rows):
            kept = (~finished).nonzero()[:, 0]
            if reader.keep(kept):
                rows, chosen, finished = rows[kept], chosen[kept], finished[kept]
        ids = chosen[:, None]


def _cut(tokens: list[list[int]], logprobs: list[list[float]], stops: set[int]) -> Generation:
    """End each answer after its first stop token; later columns belong to no one."""
    lengths = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in tokens]
    return Generation(
        [row[:length] for row, length in zip(tokens, lengths)],
        [row[:length] for row, length in zip(logprobs, lengths)],
    )


def play(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: Sequence[Any],
    *,
    turns: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    dtype: Any = "float32",
) -> list[Episode]:
    """Play one episode per problem, all of them side by side.

    After a wrong answer the answer and the verifier's message are appended to the conversation and the model
    tries again, ``turns`` times at most. Random numbers are drawn for every episode in every turn, whether it
    still runs or not: episode i's luck in turn t depends on the generator alone, so two checkpoints, or two
    batch sizes, given equal generators see the same numbers.
    """
    episodes = [Episode(problem) for problem in problems]
    conversations: list[list[Message]] = [list(task.prompt(problem)) for problem in problems]
    running = list(range(len(episodes)))
    for _ in range(turns):
        uniforms = torch.rand(len(episodes), task.max_answer_tokens, generator=generator)
        for first in range(0, len(running), batch_size):
            chunk = running[first : first + batch_size]
            prompts = [encode_prompt(tokenizer, conversations[i]) for i in chunk]
            generation = generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=task.max_answer_tokens,
                temperature=temperature,
                top_p=top_p,
                uniforms=uniforms[chunk],
                dtype=dtype,
            )
            for i, prompt, tokens, logprobs in zip(chunk, prompts, generation.tokens, generation.logprobs):
                answer = decode_answer(tokenizer, tokens)
                verdict = task.verify(problems[i], answer)
                episodes[i].turns.append(Turn(prompt, tokens, logprobs, answer, verdict))
                conversations[i] += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": verdict.message},
                ]
        running = [i for i in running if not episodes[i].solved]
        if not running:
            break
    return episodes
