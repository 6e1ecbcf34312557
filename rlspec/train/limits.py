"""Whether conversations fit a model: the rows of its embedding, and its table of positions if it has one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rlspec.errors import CheckpointError, OptionError
from rlspec.train.encode import encode_answer, encode_prompt

if TYPE_CHECKING:
    from rlspec.tasks.base import Task


def position_limit(model: Any) -> int | None:
    """Positions that a model has an entry for; None where it computes them (rotary, ALiBi, recurrent).

    Past the table there is nothing to look up: an IndexError, on CUDA a failed assertion that ends the process.
    """
    config = model.config.get_text_config()
    if config.model_type == "mpt":  # ALiBi, but from a table of this length
        return int(config.max_seq_len)
    declared = getattr(config, "max_position_embeddings", None)
    if declared is None:
        return None
    tables = [(name, part.weight) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    for name, table in [*tables, *model.named_buffers()]:
        last = name.rpartition(".")[2]
        # Some tables have a row or two more than there are positions.
        if ("pos" in last or last == "wpe") and table.ndim == 2 and len(table) >= declared:
            return int(declared)
    return None


def check_length(model: Any, tokens: int) -> None:
    """Refuse a sequence that is longer than the model's table of positions.

    Raises:
        OptionError: it has ``tokens`` tokens and the model fewer positions.
    """
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise OptionError(
            f"prompt and answer take up to {tokens} tokens, the model has {limit} positions; "
            "ask for shorter ones, or use a model with a longer context"
        )


@dataclass(frozen=True)
class Needs:
    """What a task's conversations need of a model, in tokens; an answer may take all it is allowed to."""

    question: int  # the longest first prompt
    answer: int
    turn: int  # what one more turn adds
    turns: int
    example: int  # the longest supervised example, which holds one earlier turn at most
    largest: int  # the largest id of any token

    @classmethod
    def of(cls, tokenizer: Any, task: Task, problems: Iterable[Any]) -> Needs:
        """Those of ``problems``: every question, and a second turn of the longest.

        Raises:
            CheckpointError: the tokenizer's chat template cannot render them.
        """
        questions = [(encode_prompt(tokenizer, task.prompt(problem)), problem) for problem in problems]
        first, longest = max(questions, key=lambda question: len(question[0]))
        answer = task.answer(longest)
        said = encode_answer(tokenizer, answer)
        second = encode_prompt(
            tokenizer,
            [
                *task.prompt(longest),
                {"role": "assistant", "content": answer},
                {"role": "user", "content": task.verify(longest, "").message},
            ],
        )
        return cls(
            question=len(first),
            answer=task.max_answer_tokens,
            turn=len(second) - len(first) - len(said) + task.max_answer_tokens,
            turns=task.max_turns,
            example=len(second) + len(said),
            largest=max(*second, *said, *(max(ids) for ids, _ in questions)),
        )

    def check(self, model: Any, folder: Path, tokenizer: Any, *, examples: bool) -> None:
        """Refuse a model that is too small; ``examples`` if it is to be fine-tuned on some.

        Raises:
            CheckpointError: a token lies past the embedding.
            OptionError: a conversation is longer than the table of positions.
        """
        rows = model.get_input_embeddings().weight.shape[0]
        if self.largest >= rows:
            token = tokenizer.convert_ids_to_tokens(self.largest)
            raise CheckpointError(
                f"{folder}: its tokenizer writes {token!r} as id {self.largest}, its embedding has {rows} rows; "
                "resize the embedding, or use the tokenizer that the model was trained with"
            )
        limit = position_limit(model)
        if limit is None:
            return
        needed = self.question + self.answer
        if examples:
            needed = max(needed, self.example)
        if needed > limit:
            raise OptionError(
                f"{folder}: a question and its answer take up to {needed} tokens, the model has {limit} "
                "positions; use a model with a longer context"
            )
        needed = self.question + self.answer + (self.turns - 1) * self.turn
        if needed > limit:
            fitting = 1 + (limit - self.question - self.answer) // self.turn
            raise OptionError(
                f"{folder}: {self.turns} turns take up to {needed} tokens, the model has {limit} positions; "
                f"turns={fitting} fits, or use a model with a longer context"
            )
