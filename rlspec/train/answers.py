"""Prompts that divergences are taken on, with the answers that the base gave where a row has none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlspec.io.files import write_error
from rlspec.io.jsonl import Row, read_rows, write_rows
from rlspec.train.generate import generate
from rlspec.train.traces import Trace, single

ANSWER_TOKENS = 64  # of a sampled answer, at most
_ROWS = 16  # prompts of one batch


def answered(
    prompts: Sequence[Trace | list[int]],
    base: Any,
    tokenizer: Any,
    kept: Path | None = None,
    by: str = "",
) -> list[Trace]:
    """The prompts as traces: those without an answer get one of the base's, sampled at temperature 1 from a fixed seed.

    Every checkpoint must be measured on the same tokens, on whatever machine, so they are kept in a file.

    Args:
        base: the model that answers.
        kept: rows of ``by``, ``row`` (of the file), ``text`` and ``tokens``; None keeps nothing.
        by: what the file calls these prompts.

    Raises:
        CheckpointError: the file cannot be written.
    """
    open_ = {i: prompt for i, prompt in enumerate(prompts) if not isinstance(prompt, Trace)}
    found: dict[int, list[int]] = {}
    others: list[Row] = []
    for row in [] if kept is None else read_rows(kept):
        if row["by"] == by:
            found[row["row"]] = row["tokens"]
        else:
            others.append(row)
    if set(found) != set(open_):
        found = _sampled(open_, base, tokenizer)
        rows: list[Row] = [
            {"by": by, "row": i, "text": tokenizer.decode(tokens), "tokens": tokens}
            for i, tokens in found.items()
        ]
        if kept is not None:
            try:
                write_rows(kept, [*others, *rows])
            except OSError as error:
                raise write_error(kept, error) from None
    return [
        prompt if isinstance(prompt, Trace) else single(prompt, found[i]) for i, prompt in enumerate(prompts)
    ]


def _sampled(prompts: dict[int, list[int]], base: Any, tokenizer: Any) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(0)
    numbers, found = list(prompts), dict[int, list[int]]()
    for first in range(0, len(numbers), _ROWS):
        batch = numbers[first : first + _ROWS]
        given = generate(
            base,
            tokenizer,
            [prompts[i] for i in batch],
            max_new_tokens=ANSWER_TOKENS,
            generator=generator,
        )
        found.update(zip(batch, given.tokens, strict=True))
    return found
