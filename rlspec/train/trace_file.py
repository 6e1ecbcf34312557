"""Rows of a JSON-lines file as token ids of which some carry loss, or are answered first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from rlspec.errors import OptionError
from rlspec.io.jsonl import Row, numbered_rows
from rlspec.train.encode import encode_answer, encode_prompt
from rlspec.train.traces import Trace, single

#: Tokens of a text that are read; a longer one is cut.
MOST_TOKENS = 512

_ANSWERED = '{"prompt": "...", "answer": "..."} or {"messages": [...], "answer": "..."}'


def read_traces(path: Path, tokenizer: Any) -> list[Trace]:
    """The rows of a file: {"text": ...}, whose every token but the first carries loss, or {"messages": [...],
    "answer": ...} or {"prompt": ..., "answer": ...}, whose answer does. The answer may be the assistant's last message or
    called "completion", as TRL has it, and a prompt a list of messages. What messages say is plain text.

    Raises:
        OptionError: the file is missing, has fewer than two rows, or a row is none of these; names the line.
    """
    traces = []
    for number, row in _rows(path):
        found = _encoded(row, tokenizer)
        if not isinstance(found, Trace):
            raise _refused(path, number, row, f'{{"text": "..."}} of two tokens or more, {_ANSWERED}')
        traces.append(found)
    if len(traces) < 2:
        raise OptionError(f"{path}: {len(traces)} rows; two at least are wanted")
    return traces


def read_prompts(path: Path, tokenizer: Any) -> list[Trace | list[int]]:
    """The same rows, and prompts that have no answer, of which the token ids are returned.

    Raises:
        OptionError: as :func:`read_traces`; one row is enough.
    """
    found = []
    for number, row in _rows(path):
        encoded = _encoded(row, tokenizer)
        if not encoded:
            wanted = f'{{"prompt": "..."}} or {{"messages": [...]}}, {_ANSWERED}, or a {{"text": "..."}} of two tokens'
            raise _refused(path, number, row, wanted)
        found.append(encoded)
    if not found:
        raise OptionError(f'{path}: no rows; wanted a {{"prompt": "..."}} on each line')
    return found


def _rows(path: Path) -> list[tuple[int, Row]]:
    if not path.is_file():
        raise OptionError(f"{path}: no such file; wanted rows of JSON with a text, or a prompt and an answer")
    return list(numbered_rows(path, OptionError, foreign=True))


def _refused(path: Path, number: int, row: Row, wanted: str) -> OptionError:
    return OptionError(f"{path}, line {number}: wanted {wanted}, found the fields {', '.join(row) or 'none'}")


def _encoded(row: Row, tokenizer: Any) -> Trace | list[int] | None:
    """A row with its answer; the ids of its prompt where that has none; None where it is neither."""
    if isinstance(text := row.get("text"), str):
        ids = list(tokenizer(text)["input_ids"])[:MOST_TOKENS]
        return single(ids[:1], ids[1:]) if len(ids) > 1 else None
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list):
        messages = prompt
    if not _are_messages(messages):
        return None
    answer = row.get("answer", row.get("completion"))
    if _are_messages(answer) and len(answer) == 1:
        answer = answer[0]["content"]
    if answer is None and messages[-1]["role"] == "assistant" and len(messages) > 1:
        *messages, last = messages
        answer = last["content"]
    if answer is None:
        return encode_prompt(tokenizer, messages)
    if not isinstance(answer, str):
        return None
    return single(encode_prompt(tokenizer, messages), encode_answer(tokenizer, answer))


def _are_messages(value: object) -> TypeGuard[list[dict[str, str]]]:
    """Whether that is a conversation of plain texts."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
