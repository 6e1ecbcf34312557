"""How far a model has moved from its base in distribution: KL divergence on fixed task prompts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlspec.errors import OptionError
from rlspec.train.batch import AnswerBatch, answer_forward, collate
from rlspec.train.divergence import divergence_sum
from rlspec.train.encode import encode_answer, encode_prompt, pad_id
from rlspec.train.modes import evaluation_mode
from rlspec.train.padding import prompt_batches

if TYPE_CHECKING:
    from rlspec.tasks.base import Task

CACHE_BYTES = 256 * 2**20
ROWS = 32  # prompts of one forward pass


class KLProbe:
    """KL(base || model) in nats per answer token, exact over the vocabulary.

    The prompts are in-distribution problems drawn from a seed, the tokens those of the reference answers, so
    that every model is measured in the same places. The base's log-probabilities are kept as float32, of as
    many whole prompts as fit into ``cache_bytes``.

    Raises:
        OptionError: not even one prompt fits.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        *,
        seed: int = 0,
        prompts: int = 32,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        rng = random.Random(f"{seed}/kl")
        problems = [task.sample(rng) for _ in range(prompts)]
        pairs = [
            (encode_prompt(tokenizer, task.prompt(problem)), encode_answer(tokenizer, task.answer(problem)))
            for problem in problems
        ]
        row_bytes = 4 * model.get_output_embeddings().weight.shape[0]
        kept: list[tuple[list[int], list[int]]] = []
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
    def _tokens(pairs: list[tuple[list[int], list[int]]]) -> int:
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
