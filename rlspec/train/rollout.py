"""Batched sampling with a key-value cache, and episodes of several verification turns played with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlspec.train.batch import accepts, autocast, left_pad, position_ids
from rlspec.train.encode import Message, decode_answer, encode_prompt, pad_id, stop_ids
from rlspec.train.modes import evaluation_mode
from rlspec.train.sampling import choose, sampling_logprobs

if TYPE_CHECKING:
    from rlspec.tasks.base import Task, Verdict

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
    """Sample one answer per prompt, all prompts in one batch.

    Args:
        prompts: token ids, at least one a prompt.
        temperature: 0 takes the most probable token.
        generator: CPU generator that ``uniforms`` are drawn from when they are not given.
        uniforms: float (len(prompts), max_new_tokens) in [0, 1): the number that decides each token. A row's
            answer depends on its own numbers only, not on when other rows finish.
        dtype: autocast of the forward passes, see :func:`rlspec.train.batch.autocast`.
    """
    if not prompts:
        return Generation([], [])
    device = next(model.parameters()).device
    if temperature > 0:
        if uniforms is None:
            uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
        uniforms = uniforms.to(device)
    ids, prompt_mask = (part.to(device) for part in left_pad(prompts, pad_id(tokenizer)))
    width = ids.shape[1]
    # Generated columns are real for every row still in the batch, so their mask is known beforehand.
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompts), max_new_tokens)], dim=1)
    positions = position_ids(mask)
    stops = torch.tensor(stop_ids(model, tokenizer), device=device)

    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(prompts), max_new_tokens, device=device)
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch belongs to
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    options: dict[str, Any] = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    takes_positions = accepts(model, "position_ids")
    cache = None
    start = 0
    with evaluation_mode(model), autocast(device, dtype):
        for step in range(max_new_tokens):
            end = width + step
            if takes_positions:
                options["position_ids"] = positions[:, start:end]
            output = model(
                ids, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **options
            )
            cache, start = output.past_key_values, end
            logits = output.logits[:, -1]
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
            if alive <= (1 - FINISHED_SHARE) * len(rows) and hasattr(cache, "batch_select_indices"):
                kept = (~finished).nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, chosen, mask, positions = rows[kept], chosen[kept], mask[kept], positions[kept]
                finished = finished[kept]
            ids = chosen[:, None]
    return _cut(tokens.tolist(), logprobs.tolist(), set(stops.tolist()), step + 1)


def _cut(tokens: list[list[int]], logprobs: list[list[float]], stops: set[int], steps: int) -> Generation:
    """End each answer after its first stop token; later columns belong to no one."""
    lengths = [
        next((i + 1 for i, token in enumerate(row[:steps]) if token in stops), steps) for row in tokens
    ]
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
