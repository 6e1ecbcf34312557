"""The embedded base model: its tokenizer, its corpus, its files, and the recipe that makes it."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rlspec.errors import CheckpointError
from rlspec.jobs.loading import load_model
from rlspec.models import embedded_model_path
from rlspec.models.corpus import KINDS, example
from rlspec.models.muon import orthogonalise
from rlspec.models.pretrain import IGNORE, collate, main, make_model
from rlspec.models.vocabulary import make_tokenizer
from rlspec.tasks import GeneralPoints, get_task, parse_expression
from rlspec.tasks.answers import read_answer


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded_model_path()


def test_checkpoint_is_small_and_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(f.stat().st_size for f in folder.iterdir()) <= 12_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_tokenizer_chooses_the_compact_style_and_reads_everything_the_task_says(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = get_task(tokenizer=tokenizer)
    assert isinstance(task, GeneralPoints)
    assert task.style == "compact"
    task.history_share = 1.0
    rng = random.Random(0)
    texts = [task.prompts.verdicts[kind].format(target=24) for kind in task.prompts.verdicts]
    for shift in task.shifts:
        for _ in range(50):
            messages, answer = task.sft_example(task.sample(rng, shift), rng)
            texts += [m["content"] for m in messages] + [answer]
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert len(ids) < task.max_answer_tokens  # the end token fits too
            assert tokenizer.decode(ids) == answer
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_chat_template_renders_turns() -> None:
    tokenizer = make_tokenizer()
    messages = [
        {"role": "user", "content": "solve 1 2 3 4"},
        {"role": "assistant", "content": "1 + 2"},
        {"role": "user", "content": "wrong value"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s> solve 1 2 3 4 > 1 + 2 </s> wrong value >"


@pytest.mark.parametrize("kind", KINDS)
def test_corpus_is_right_and_never_shows_the_task(kind: str) -> None:
    tokenizer = make_tokenizer()
    known = set(tokenizer.get_vocab())
    rng = random.Random(0)
    for _ in range(300):
        prompt, answer = example(kind, rng)
        words = set(prompt.split()) | set(answer.split())
        assert words <= known
        assert not words & {"target", "unfinished", "wrong", "value", "numbers", "illegal"}
        assert "cards" not in answer.split()
        if words & {"J", "Q", "K"}:
            assert "formula" not in words
            assert "=" not in words
        if kind == "arithmetic":
            assert parse_expression(prompt).value == int(answer)
        elif "formula" in words or kind == "solve":
            formula = read_answer(answer).formula if kind != "solve" else answer
            assert formula is not None
            assert parse_expression(formula).value == 24


@pytest.mark.parametrize("kind", ["translate", "alias"])
def test_rules_are_followed_in_the_corpus(kind: str) -> None:
    rng = random.Random(1)
    for _ in range(300):
        prompt, answer = example(kind, rng)
        words = prompt.split()
        table = dict(zip(words[1:7:2], words[2:7:2])) | {"A": "1"}
        numbers = answer.split("formula")[0].split("number")[1].split()
        assert numbers == [table.get(card, card) for card in prompt.split("cards ")[1].split()]


def test_orthogonalise_evens_out_singular_values_and_keeps_directions() -> None:
    G = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for matrices in (G, G.mT):
        U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
        X = orthogonalise(matrices)
        core = U.mT @ X @ Vh.mT
        values = core.diagonal(dim1=-2, dim2=-1)
        assert bool(((values > 0.6) & (values < 1.3)).all())
        assert float((core - torch.diag_embed(values)).abs().max()) < 1e-9
        torch.testing.assert_close(U @ core @ Vh, X, rtol=0, atol=1e-10)


def test_collate_puts_the_loss_on_the_answer_alone() -> None:
    tokenizer = make_tokenizer()
    tokens, labels = collate([("1 + 2", "3"), ("solve 1 2", "1 + 2 = 3")], tokenizer)
    assert tokens.shape == labels.shape == (2, 11)
    assert tokenizer.convert_ids_to_tokens(labels[0][labels[0] != IGNORE].tolist()) == ["3", "</s>"]
    assert bool((tokens[labels != IGNORE] == labels[labels != IGNORE]).all())


def test_recipe_runs_and_is_reproducible(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name in ("a", "b"):
        result = CliRunner().invoke(main, ["--out", str(tmp_path / name), "--steps", "2", "--held-out", "8"])
        assert result.exit_code == 0, result.output
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    fresh = make_model(make_tokenizer()).state_dict()
    assert set(a) == set(fresh)
    refused = CliRunner().invoke(main, ["--out", str(tmp_path / "a"), "--steps", "2"])
    assert refused.exit_code == 1
    assert "exists already" in refused.output


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    folder = shutil.copytree(embedded_model_path(), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(folder))}: transformers cannot load it: .*header"
    ):
        load_model(folder, torch.device("cpu"))
