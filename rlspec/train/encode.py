"""Messages to token ids and back, for any tokenizer, with or without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlspec.tasks.base import Message
from rlspec.train.template import closing, has_template, render


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends where the assistant's answer begins.

    The tokenizer's own chat template is used where there is one; otherwise the conversation is rendered as
    ``User: …`` and ``Assistant: …`` lines after the tokenizer's start token, if it has one.

    Raises:
        CheckpointError: the chat template cannot render the conversation.
    """
    if has_template(tokenizer):
        text = render(tokenizer, messages, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
    ids = tokenizer("".join(lines) + "Assistant:", add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id
    return ([] if start is None else [start]) + list(ids)


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an assistant's answer, closed as the chat template closes it; by the tokenizer's end token
    (if it has one) where the template does not say.
    """
    # Without a template the prompt ends in "Assistant:", so the answer starts after a space.
    text = answer if has_template(tokenizer) else f" {answer}"
    if (end := closing(tokenizer)) is not None:
        return list(tokenizer(text + end.text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def encode_example(tokenizer: Any, messages: Sequence[Message], answer: str) -> tuple[list[int], list[bool]]:
    """A supervised example: ids of prompt and answer, and which of them carry loss (answer and end token)."""
    prompt, target = encode_prompt(tokenizer, messages), encode_answer(tokenizer, answer)
    return prompt + target, [False] * len(prompt) + [True] * len(target)


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of a sampled answer, without special tokens, the end of the turn and surrounding white space."""
    end = closing(tokenizer)
    text = ids[:-1] if end is not None and ids and ids[-1] == end.token else ids
    return tokenizer.decode(list(text), skip_special_tokens=True).strip()


def pad_id(model: Any, tokenizer: Any) -> int:
    """A token id to fill padding with. Padding is always masked, so any id of the model's embedding will do.

    A padding token that was added to the tokenizer lies past an embedding that was never resized.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < rows:
            return int(candidate)
    return 0


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: what the chat template ends a turn with, the tokenizer's end token and those of
    the model's generation config.
    """
    end = closing(tokenizer)
    found = [tokenizer.eos_token_id, None if end is None else end.token]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found += configured if isinstance(configured, (list, tuple)) else [configured]
    return sorted({int(token) for token in found if token is not None})
