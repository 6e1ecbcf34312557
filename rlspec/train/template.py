"""Conversations as a tokenizer's chat template writes them, and how it ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from rlspec.errors import CheckpointError
from rlspec.tasks.base import Message

#: Two words that no template writes by itself.
_QUESTION, _ANSWER = "QuestionText", "AnswerText"


@dataclass(frozen=True)
class Closing:
    """What a chat template writes after an answer, up to and including the token that ends the turn."""

    text: str
    token: int


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer carries a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The conversation as text, by the tokenizer's own chat template.

    Templates of multimodal models loop over a message's parts and write nothing for a plain string. So content
    goes in as text first and as one text part second, and what comes out must hold what was asked.

    Raises:
        CheckpointError: the template does not parse, refuses the conversation, or leaves out its text.
    """
    failure = "it writes a conversation without the question's text"
    rendered: list[str] = []
    for shape in (_as_text, _as_parts):
        try:
            text = tokenizer.apply_chat_template(
                shape(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
        # A template is a program of the checkpoint's author: it may raise anything.
        except Exception as error:
            if shape is _as_text:
                failure = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        if _holds(text, messages):
            return text
        rendered.append(text)
    # Templates may leave out an earlier answer's reasoning.
    questions = [message for message in messages if message["role"] != "assistant"]
    for text in rendered:
        if _holds(text, questions):
            return text
    roles = dict.fromkeys(message["role"] for message in messages)
    raise CheckpointError(
        f"{getattr(tokenizer, 'name_or_path', '') or 'tokenizer'}: its chat template cannot be used: {failure}; "
        f"give the folder one that takes text messages of {' and '.join(roles)}, or none"
    )


def _as_text(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]


def _as_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _holds(text: str, messages: Sequence[Message]) -> bool:
    """Whether a rendering holds every message's text, but for white space, which templates trim."""
    whole = "".join(text.split())
    return all("".join(message["content"].split()) in whole for message in messages)


_closings: WeakKeyDictionary[Any, tuple[Any, Closing | None]] = WeakKeyDictionary()


def closing(tokenizer: Any) -> Closing | None:
    """How the tokenizer's chat template ends an answer; None where it has no template, or one that does not
    end with an answer, or not the answer with a token of its own.
    """
    if not has_template(tokenizer):
        return None
    known = _closings.get(tokenizer)
    # A template can be replaced on a tokenizer in use.
    if known is None or known[0] != tokenizer.chat_template:
        known = _closings[tokenizer] = (tokenizer.chat_template, _find_closing(tokenizer))
    return known[1]


def _find_closing(tokenizer: Any) -> Closing | None:
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render(tokenizer, messages, add_generation_prompt=False)
    except CheckpointError:
        return None
    if _ANSWER not in text:
        return None
    after = text[text.rindex(_ANSWER) + len(_ANSWER) :]
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    # Some tokenizers hold their end of a turn as a plain added token; lines of white space are added ones too.
    added = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip()
    }
    for tokens in (special, added):
        found = [(after.index(token), -len(token), token) for token in tokens if token in after]
        if found:
            start, _, token = min(found)
            return Closing(after[: start + len(token)], int(tokens[token]))
    return None
