"""The rows of a file that losses are measured on, as token ids of which some carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlspec.errors import OptionError
from rlspec.io.jsonl import Row, numbered_rows
from rlspec.train.encode import encode_answer, encode_prompt
from rlspec.train.traces import Trace, single

#: Tokens of a text that are read; a longer one is cut.
MOST_TOKENS = 512


def read_traces(path: Path, tokenizer: Any) -> list[Trace]:
    """The rows of a JSON-lines file: {"text": ...}, whose every token but the first carries loss, or
    {"messages": [...], "answer": ...} or {"prompt": ..., "answer": ...}, whose answer does.

    Raises:
        OptionError: the file is missing, or a row is none of these; names the line.
    """
    if not path.is_file():
        raise OptionError(f"{path}: no such file; wanted rows of JSON with a text, or a prompt and an answer")
    traces = []
    for number, row in numbered_rows(path, OptionError, foreign=True):
        trace = _trace(row, tokenizer)
        if trace is None:
            raise OptionError(
                f'{path}, line {number}: wanted {{"text": "..."}} of two tokens or more, {{"prompt": "...", "answer": '
                f'"..."}} or {{"messages": [...], "answer": "..."}}, found the fields {", ".join(row) or "none"}'
            )
        traces.append(trace)
    if len(traces) < 2:
        raise OptionError(f"{path}: {len(traces)} rows; two at least are wanted")
    return traces


def halves(traces: Sequence[Trace]) -> tuple[list[Trace], list[Trace]]:
    """Every other row to search on, and the rest to confirm on."""
    return list(traces[::2]), list(traces[1::2])


def _trace(row: Row, tokenizer: Any) -> Trace | None:
    if isinstance(text := row.get("text"), str):
        ids = list(tokenizer(text)["input_ids"])[:MOST_TOKENS]
        return single(ids[:1], ids[1:]) if len(ids) > 1 else None
    answer, prompt, messages = row.get("answer"), row.get("prompt"), row.get("messages")
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if not isinstance(answer, str) or not isinstance(messages, list) or not messages:
        return None
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        return None
    return single(encode_prompt(tokenizer, messages), encode_answer(tokenizer, answer))
