"""KL to the base on a file of prompts, and token losses of adapters, of the checkpoints of a series."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_toys import save_toy_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlspec
from rlspec.errors import CheckpointError, OptionError
from rlspec.io.adapter import Adapter
from rlspec.io.index import CheckpointIndex
from rlspec.jobs.series.models import add_adapter, load_checkpoint
from rlspec.report.series import read_series
from rlspec.train.divergence import divergence_sum
from rlspec.train.encode import encode_answer, encode_prompt
from rlspec.train.texts import text_losses

pytestmark = pytest.mark.usefixtures("own_cache")
ASKED = [{"role": "user", "content": "cards 1 2 3 4"}]
TEXTS = ["cards 1 2 3 4 number 24", "number 24"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for i, name in enumerate(("base", "run/checkpoint-10", "run/checkpoint-20")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_toy_model(tmp_path / name, initializer_range=0.1 + 0.05 * i)
    return tmp_path


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kl(run: Path, prompts: Path, **more: Any) -> dict[str, dict[str, Any]]:
    series = rlspec.measure(run / "base", run / "run", modules="q", prompts=prompts, **more)
    return {row["checkpoint"]: row for row in series.scores}


def logits(place: Path, ids: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64)
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0]
    return found


def truth(base: Path, other: Path, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Mean over answer tokens, each pair by itself, in float64."""
    total = 0.0
    for prompt, answer in pairs:
        p, q = (
            logits(place, prompt + answer)[len(prompt) - 1 : -1].log_softmax(-1) for place in (base, other)
        )
        total += float((p.exp() * (p - q[:, : p.shape[1]])).sum())
    return total / sum(len(answer) for _, answer in pairs)


def test_it_is_the_divergence_of_every_answer_token_over_the_whole_vocabulary(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    prompts = write(
        run / "prompts.jsonl",
        {"prompt": "cards 1 2 3 4", "answer": "number 24"},
        {"messages": ASKED, "answer": "24"},
        {"messages": [*ASKED, {"role": "assistant", "content": "24"}]},
        {"prompt": ASKED, "answer": "1 2 3"},
        {"text": TEXTS[0]},
    )
    asked, text = encode_prompt(tokenizer, ASKED), tokenizer(TEXTS[0])["input_ids"]
    answers = [encode_answer(tokenizer, answer) for answer in ("number 24", "24", "24", "1 2 3")]
    pairs = [*((asked, answer) for answer in answers), (text[:1], text[1:])]
    found = kl(run, prompts)
    assert set(found) == {"checkpoint-10", "checkpoint-20"}
    for label, row in found.items():
        assert row["value"] == pytest.approx(truth(run / "base", run / "run" / label, pairs), rel=1e-4)
        assert row["score"] == "kl_base" and row["n"] == 5 and row["value"] > 1e-3
        assert sum(row["results"]) / 5 == pytest.approx(row["value"])
    assert found["checkpoint-10"]["value"] < found["checkpoint-20"]["value"]


def test_of_the_base_it_is_nothing_at_all(run: Path) -> None:
    shutil.rmtree(run / "run")
    shutil.copytree(run / "base", run / "run" / "checkpoint-0")
    assert kl(run, write(run / "prompts.jsonl", {"text": TEXTS[0]}))["checkpoint-0"]["value"] == 0.0


def test_prompts_without_answers_get_the_base_s_once_for_all_checkpoints(run: Path) -> None:
    prompts = write(
        run / "prompts.jsonl",
        {"prompt": "cards 1 2 3 4"},
        {"prompt": "number", "answer": "24"},
        {"messages": ASKED},
    )
    found = kl(run, prompts, out=run / "out")
    kept = [json.loads(line) for line in (run / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["row"] for row in kept] == [0, 2] and all(0 < len(row["tokens"]) <= 64 for row in kept)
    assert kept[0]["tokens"] != kept[1]["tokens"]  # the same prompt, each with draws of its own
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    assert tokenizer.decode(kept[0]["tokens"]) == kept[0]["text"]
    asked = encode_prompt(tokenizer, ASKED)
    number = encode_prompt(tokenizer, [{"role": "user", "content": "number"}])
    pairs = [
        (asked, kept[0]["tokens"]), (number, encode_answer(tokenizer, "24")), (asked, kept[1]["tokens"])
    ]  # fmt: skip
    for label, row in found.items():
        assert row["value"] == pytest.approx(truth(run / "base", run / "run" / label, pairs), rel=1e-4)
    # A later checkpoint meets the answers of the file, whatever would be sampled now.
    kept[0]["tokens"] = kept[0]["tokens"][:2]
    write(run / "out" / "answers.jsonl", *kept)
    shutil.copytree(run / "run" / "checkpoint-20", run / "run" / "checkpoint-30")
    later = kl(run, prompts, out=run / "out")
    assert later["checkpoint-20"] == found["checkpoint-20"]
    pairs[0] = (asked, kept[0]["tokens"])
    expected = truth(run / "base", run / "run" / "checkpoint-30", pairs)
    assert later["checkpoint-30"]["value"] == pytest.approx(expected, rel=1e-4)


def test_an_edited_file_is_scored_anew_and_the_old_scores_are_not_mixed_in(run: Path) -> None:
    prompts = write(run / "prompts.jsonl", {"text": TEXTS[0]})
    before = kl(run, prompts, out=run / "out")
    write(prompts, {"text": TEXTS[1]})
    after = kl(run, prompts, out=run / "out")
    assert before["checkpoint-10"]["value"] != after["checkpoint-10"]["value"]
    write(prompts, {"text": TEXTS[0]})
    assert kl(run, prompts, out=run / "out") == before  # nothing was lost
    assert len((run / "out" / "scores.jsonl").read_text().splitlines()) == 4
    reported = {event["checkpoint"]: event["scores"] for event in read_series(run / "out").metrics}
    assert reported == {label: {"kl_base": row["value"]} for label, row in before.items()}


def test_tokens_that_training_has_added_have_no_probability_at_the_base(run: Path) -> None:
    """To the divergence they count by what the others are left with."""
    p, q = torch.randn(70, 9).double(), torch.randn(70, 12).double()
    base, other = p.log_softmax(-1), q.log_softmax(-1)
    expected = float((base.exp() * (base - other[:, :9])).sum())
    assert divergence_sum(p, q) == pytest.approx(expected, rel=1e-12)
    model = AutoModelForCausalLM.from_pretrained(run / "run" / "checkpoint-20")
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 5)
    model.save_pretrained(run / "run" / "checkpoint-30")
    prompts = write(run / "prompts.jsonl", {"text": TEXTS[0]})
    ids = AutoTokenizer.from_pretrained(run / "base")(TEXTS[0])["input_ids"]
    expected = truth(run / "base", run / "run" / "checkpoint-30", [(ids[:1], ids[1:])])
    assert kl(run, prompts)["checkpoint-30"]["value"] == pytest.approx(expected, rel=1e-4)
    model.resize_token_embeddings(size - 1)
    model.save_pretrained(run / "run" / "checkpoint-30")
    with pytest.raises(
        OptionError, match=rf"checkpoint-30: .* logits of {size - 1} tokens, its base of {size}"
    ):
        kl(run, prompts)


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, False),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ],
)
def test_an_adapter_s_losses_are_those_of_peft_s_model(
    changes: dict[str, Any], tied: bool, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    shutil.rmtree(run / "base")
    base = save_toy_model(run / "base", tie_word_embeddings=tied)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=8, **changes)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(run / "adapters" / "checkpoint-10", save_embedding_layers=False)
    tokenizer, untuned = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    expected = text_losses(tuned, tokenizer, TEXTS)
    texts = write(run / "texts.jsonl", *({"text": text} for text in TEXTS))
    with caplog.at_level(logging.ERROR):
        series = rlspec.measure(base, run / "adapters", texts=texts, prompts=texts)
    found = {(row["checkpoint"], row["score"]): row for row in series.scores}
    assert found["checkpoint-10", "text_loss"]["results"] == pytest.approx(expected, rel=1e-5)
    start = text_losses(untuned, tokenizer, TEXTS)
    beyond = [after - before for after, before in zip(expected, start)]
    assert found["checkpoint-10", "forgetting"]["results"] == pytest.approx(beyond, abs=1e-5)
    assert max(map(abs, beyond)) > 1e-3 and found["checkpoint-10", "kl_base"]["value"] > 1e-5


def test_an_adapter_of_what_is_no_parameter_is_told_with_the_way_out(run: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(run / "base"), config)
    tuned.save_pretrained(run / "adapter")
    adapter = Adapter.open(run / "adapter", CheckpointIndex.open(run / "base"))
    model = load_checkpoint(run / "base", run / "base", torch.device("cpu"))
    del model.model.layers[1]
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj.*merge the adapter with PEFT"):
        add_adapter(model, adapter)


def test_completions_are_answers_as_trl_has_them(run: Path) -> None:
    answer = "number 24"
    forms = [
        {"messages": ASKED, "answer": answer},
        {"prompt": ASKED[0]["content"], "completion": answer},
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": answer}]},
    ]
    found = [kl(run, write(run / "prompts.jsonl", form))["checkpoint-10"] for form in forms]
    assert found[0]["results"] == found[1]["results"] == found[2]["results"]


@pytest.mark.parametrize("content", [[{"type": "text", "text": "hi"}], None, 5])
@pytest.mark.parametrize("where", ["messages", "prompt", "role"])
def test_what_is_no_plain_text_is_told_with_its_line(content: Any, where: str, run: Path) -> None:
    message = {"role": content, "content": "hi"} if where == "role" else {"role": "user", "content": content}
    row = {"messages" if where == "role" else where: [message]}
    path = write(run / "prompts.jsonl", {"prompt": "number 24"}, row)
    with pytest.raises(
        OptionError, match=r"prompts\.jsonl, line 2: wanted .*found the fields (messages|prompt)"
    ):
        kl(run, path)
