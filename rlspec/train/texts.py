"""Mean token loss of a causal model on texts: what it has forgotten, read from any text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from rlspec.errors import OptionError
from rlspec.io.jsonl import numbered_values
from rlspec.io.module import gathered
from rlspec.train.limits import position_limit
from rlspec.train.modes import evaluation_mode

#: Tokens of each text that count; what follows is cut off.
MAX_TOKENS = 1024


def read_texts(path: str | Path) -> list[str]:
    """The texts of a JSONL file: a JSON object on each line, the text under ``text``.

    Raises:
        OptionError: there is no such file, a line is no such object, or there is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"texts={str(path)!r}: no such file")
    texts = []
    for number, row in numbered_values(path, OptionError, foreign=True):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise OptionError(f'{path}, line {number}: no text, wanted {{"text": "..."}}')
        texts.append(row["text"])
    if not texts:
        raise OptionError(f'{path}: no texts, wanted a line {{"text": "..."}} for each')
    return texts


def text_losses(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_tokens: int = MAX_TOKENS
) -> list[float]:
    """The loss of each text, so scaled that their mean is the mean token loss over all texts, in nats.

    Element i is the sum of text i's token losses divided by the mean number of predicted tokens of a text. The first
    token of a text, which nothing predicts, has none. Texts go through the model one by one, in eval mode and without
    gradients; logits are taken to float32.

    Raises:
        OptionError: no text has two tokens.
    """
    ids = text_tokens(model, tokenizer, texts, max_tokens=max_tokens)
    return scaled_losses(ids, token_loss_sums(model, ids))


def text_tokens(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_tokens: int = MAX_TOKENS
) -> list[list[int]]:
    """The tokens of each text that count.

    Raises:
        OptionError: no text has two.
    """
    limit = position_limit(model)
    most = max_tokens if limit is None else min(max_tokens, limit)
    found = [list(tokenizer(text)["input_ids"][:most]) for text in texts]
    if all(len(ids) < 2 for ids in found):
        raise OptionError("no text has two tokens, so none has a loss")
    return found


def token_loss_sums(model: Any, ids: Iterable[Sequence[int]]) -> list[float]:
    """The sum of each text's token losses, in nats; 0 where nothing is predicted, without a forward pass."""
    device, sums = next(model.parameters()).device, []
    with torch.no_grad(), evaluation_mode(model):
        for one in ids:
            if len(one) < 2:
                sums.append(0.0)
                continue
            tokens = torch.tensor([list(one)], device=device)
            logits = gathered(model(input_ids=tokens, use_cache=False).logits)[0, :-1].float()
            wanted = tokens[0, 1:].to(logits.device)  # of an offloaded model those are elsewhere
            sums.append(F.cross_entropy(logits, wanted, reduction="sum").item())
    return sums


def scaled_losses(ids: Sequence[Sequence[int]], sums: Sequence[float]) -> list[float]:
    """What :func:`text_losses` returns, from the tokens of each text and the sums of their losses."""
    tokens = sum(len(one) - 1 for one in ids if len(one) > 1)
    return [total * len(sums) / tokens for total in sums]
