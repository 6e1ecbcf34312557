"""Episodes of several verification turns, played side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlspec.train.encode import decode_answer, encode_prompt
from rlspec.train.generate import generate
from rlspec.train.memory import Memory

if TYPE_CHECKING:
    from rlspec.tasks.base import Message, Task, Verdict


@dataclass(frozen=True)
class Turn:
    """One answer of an episode and what the verifier said to it."""

    prompt_ids: list[int]
    answer_ids: list[int]
    logprobs: list[float]
    states: Tensor = field(compare=False, repr=False)  # (T, H) that the first tokens were sampled from
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
    states: int = 0,
) -> list[Episode]:
    """Play one episode per problem, ``batch_size`` of them side by side.

    After a wrong answer the answer and the verifier's message are appended to the conversation and the model
    tries again, ``turns`` times at most; what it has read of the conversation it need not read again, where
    its layers allow that. Random numbers are drawn for every episode and every turn beforehand: episode i's
    luck in turn t depends on the generator alone, so two checkpoints, or two batch sizes, given equal
    generators see the same numbers.

    Args:
        states: of how many first tokens of each answer to keep the hidden states.
    """
    uniforms = [torch.rand(len(problems), task.max_answer_tokens, generator=generator) for _ in range(turns)]
    episodes = [Episode(problem) for problem in problems]
    conversations: list[list[Message]] = [list(task.prompt(problem)) for problem in problems]
    for first in range(0, len(episodes), batch_size):
        running = list(range(first, min(first + batch_size, len(episodes))))
        memory = Memory()
        for turn in range(turns):
            prompts = [encode_prompt(tokenizer, conversations[i]) for i in running]
            generation = generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=task.max_answer_tokens,
                temperature=temperature,
                top_p=top_p,
                uniforms=uniforms[turn][running],
                dtype=dtype,
                states=states,
                memory=memory,
                names=running,
            )
            for n, i in enumerate(running):
                tokens = generation.tokens[n]
                answer = decode_answer(tokenizer, tokens)
                verdict = task.verify(problems[i], answer)
                episodes[i].turns.append(
                    Turn(prompts[n], tokens, generation.logprobs[n], generation.states[n], answer, verdict)
                )
                conversations[i] += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": verdict.message},
                ]
            running = [i for i in running if not episodes[i].solved]
            if not running:
                break
    return episodes
