"""How far a model has moved from its base in distribution: KL divergence on fixed task prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlspec.errors import OptionError
from rlspec.train.answers import answered
from rlspec.train.batch import AnswerBatch, answer_forward, collate
from rlspec.train.divergence import divergence_sum
from rlspec.train.encode import encode_answer, encode_prompt, pad_id
from rlspec.train.modes import evaluation_mode
from rlspec.train.padding import prompt_batches
from rlspec.train.trace_file import read_prompts
from rlspec.train.traces import Pair

if TYPE_CHECKING:
    from rlspec.tasks.base import Task

CACHE_BYTES = 256 * 2**20
ROWS = 32  # prompts of one forward pass
TASK_PROMPTS = 32


class KLProbe:
    """KL(base || model) in nats per answer token, exact over the vocabulary.

    The tokens are fixed, so that every model is measured in the same places, and the base's log-probabilities at them are
    kept as float32, of as many whole prompts as fit into ``cache_bytes``: the base itself is not needed again.

    Args:
        model: the base, as it is now.
        problems: a task, whose in-distribution problems are drawn from ``seed``, with their reference answers; or a JSONL
            file of prompts (see ``rlspec.train.trace_file.read_prompts``), whose missing answers are sampled from the
            base.
        prompts: how many are taken at most; None takes 32 of a task and all of a file.

    Attributes:
        prompts, tokens: how many fit.

    Raises:
        OptionError: not even one prompt fits, or the file is not one of prompts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        problems: Task | str | Path,
        *,
        seed: int = 0,
        prompts: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if isinstance(problems, (str, Path)):
            read = read_prompts(Path(problems), tokenizer)[:prompts]
            pairs = [trace.pair for trace in answered(read, model, tokenizer)]
        else:
            pairs = _task_pairs(problems, tokenizer, seed, TASK_PROMPTS if prompts is None else prompts)
        row_bytes = 4 * model.get_output_embeddings().weight.shape[0]
        kept: list[Pair] = []
        for pair in pairs:
            if (self._tokens(kept) + len(pair[1])) * row_bytes > cache_bytes:
                break
            kept.append(pair)
        if not kept:
            raise OptionError(f"KL probe: {cache_bytes} bytes hold no answer of {row_bytes} bytes a token")
        self.prompts = len(kept)
        self.tokens = self._tokens(kept)
        self._pad = pad_id(model, tokenizer)
        self._pairs = [
            [chunk[row] for row in rows]
            for chunk in (kept[i : i + ROWS] for i in range(0, len(kept), ROWS))
            for rows in prompt_batches(model, [prompt for prompt, _ in chunk], self._pad)
        ]
        self._base = [logprobs.cpu() for logprobs in self._logprobs(model)]

    @staticmethod
    def _tokens(pairs: list[Pair]) -> int:
        return sum(len(answer) for _, answer in pairs)

    @torch.no_grad()
    def _logprobs(self, model: Any) -> list[Tensor]:
        """float32 (tokens, V) per batch of prompts."""
        device = next(model.parameters()).device
        found: list[Tensor] = []
        with evaluation_mode(model):
            for pairs in self._pairs:
                batch: AnswerBatch = collate(pairs, self._pad, device)
                logits, _ = answer_forward(model, batch)
                found.append(torch.log_softmax(logits[batch.answer_mask].float(), dim=-1))
        return found

    def measure(self, model: Any) -> float:
        """Mean over the answer tokens. Costs one forward pass of the prompts."""
        pairs = zip(self._base, self._logprobs(model))
        return sum(divergence_sum(base, other) for base, other in pairs) / self.tokens


def _task_pairs(task: Task, tokenizer: Any, seed: int, count: int) -> list[Pair]:
    rng = random.Random(f"{seed}/kl")
    problems = [task.sample(rng) for _ in range(count)]
    return [
        (encode_prompt(tokenizer, task.prompt(problem)), encode_answer(tokenizer, task.answer(problem)))
        for problem in problems
    ]
