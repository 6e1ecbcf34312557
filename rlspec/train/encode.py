"""Messages to token ids and back, for any tokenizer, with or without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends where the assistant's answer begins.

    The tokenizer's own chat template is used where there is one; otherwise the conversation is rendered as
    ``User: …`` and ``Assistant: …`` lines after the tokenizer's start token, if it has one.
    """
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(ids)
    lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
    ids = tokenizer("".join(lines) + "Assistant:", add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id
    return ([] if start is None else [start]) + list(ids)


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an assistant's answer, closed by the tokenizer's end token (if it has one)."""
    # Without a template the prompt ends in "Assistant:", so the answer starts after a space.
    text = answer if getattr(tokenizer, "chat_template", None) else f" {answer}"
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def encode_example(tokenizer: Any, messages: Sequence[Message], answer: str) -> tuple[list[int], list[bool]]:
    """A supervised example: ids of prompt and answer, and which of them carry loss (answer and end token)."""
    prompt, target = encode_prompt(tokenizer, messages), encode_answer(tokenizer, answer)
    return prompt + target, [False] * len(prompt) + [True] * len(target)


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of a sampled answer, without special tokens and surrounding white space."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def pad_id(tokenizer: Any) -> int:
    """A token id to fill padding with. Padding is always masked, so any id of the vocabulary will do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end token and those of the model's generation config."""
    found = [tokenizer.eos_token_id]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found += configured if isinstance(configured, (list, tuple)) else [configured]
    return sorted({int(token) for token in found if token is not None})
