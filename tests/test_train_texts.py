"""Token loss on texts against transformers' own loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_toys import toy_model, toy_tokenizer

from rlspec.errors import OptionError
from rlspec.train.texts import read_texts, text_losses

TEXTS = ["1 2 3 yes no", "4", "no no again 7 8 9 1", "5 6"]


def test_the_mean_is_the_token_loss_of_transformers_over_all_texts() -> None:
    model, tokenizer = toy_model(attention_dropout=0.5).double().train(), toy_tokenizer()
    total, tokens = 0.0, 0
    model.eval()
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    model.train()
    found = text_losses(model, tokenizer, TEXTS)
    assert model.training
    assert found[1] == 0.0  # one token, which nothing predicts
    assert sum(found) / len(found) == pytest.approx(total / tokens, rel=1e-6)


def test_long_texts_are_cut_at_the_tokens_that_count_and_at_the_model_s_positions() -> None:
    model, tokenizer = toy_model(), toy_tokenizer()
    assert text_losses(model, tokenizer, ["1 2 3 4 5 6"], max_tokens=3) == pytest.approx(
        text_losses(model, tokenizer, ["1 2 3"])
    )
    many = " ".join("1234567890"[i % 10] for i in range(500))  # 128 positions
    assert torch.isfinite(torch.tensor(text_losses(model, tokenizer, [many]))).all()


def test_texts_without_a_last_newline_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a\\nb", "id": 1}\n\n{"text": "c"}')
    assert read_texts(path) == ["a\nb", "c"]
    for content, told in [
        ('{"text": "a"}\n{"txt": "a"}\n', "line 2: no text"),
        ("[1]\n", "line 1: no text"),
        ("{\n", "line 1: not JSON"),
        ("", "no texts"),
    ]:
        path.write_text(content)
        with pytest.raises(OptionError, match=told):
            read_texts(path)
    with pytest.raises(OptionError, match="no such file"):
        read_texts(tmp_path / "other.jsonl")
    with pytest.raises(OptionError, match="no text has two tokens"):
        text_losses(toy_model(), toy_tokenizer(), ["1"])
