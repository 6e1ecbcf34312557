"""Tokens past the embedding and prompts past the table of positions, for models with and without a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from train_toys import (
    ToyProblem,
    ToyTask,
    byte_tokenizer,
    family_model,
    toy_model,
    toy_prompts,
    toy_tokenizer,
)

from rlspec.cli.main import main
from rlspec.errors import CheckpointError, OptionError
from rlspec.train import SFTConfig, train_sft
from rlspec.train.encode import pad_id
from rlspec.train.generate import generate
from rlspec.train.limits import Needs, position_limit

TABLES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "biogpt": {},
    "ctrl": {"dff": 48},
    "openai-gpt": {},
    "mpt": {"max_seq_len": 64},
}
COMPUTED: dict[str, dict[str, Any]] = {"llama": {}, "gpt_neox": {}, "bloom": {}, "xglm": {}, "mamba": {}}


def reads(model: Any, tokens: int) -> bool:
    try:
        model(torch.full((1, tokens), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", [*TABLES, *COMPUTED])
def test_the_limit_is_where_the_model_fails(kind: str) -> None:
    model = family_model(kind, **{**TABLES, **COMPUTED}[kind])
    assert reads(model, 64)
    assert reads(model, 65) == (kind in COMPUTED)
    assert position_limit(model) == (None if kind in COMPUTED else 64)


def test_padding_takes_an_id_that_exists() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    model = toy_model()
    assert tokenizer.pad_token_id == model.get_input_embeddings().num_embeddings
    assert pad_id(model, tokenizer) == tokenizer.eos_token_id
    prompts = toy_prompts(6)
    added = generate(model, tokenizer, prompts, max_new_tokens=6, temperature=0)
    assert added == generate(model, toy_tokenizer(), prompts, max_new_tokens=6, temperature=0)
    tokenizer.add_special_tokens({"eos_token": "<newer>"})
    assert pad_id(model, tokenizer) == 0
    # The last id that exists does, and one more does not.
    tokenizer.pad_token_id = 17
    assert pad_id(model, tokenizer) == 17


def test_a_sequence_past_the_table_is_refused_and_the_longest_that_fits_is_not() -> None:
    model, tokenizer = family_model("gpt2"), toy_tokenizer()
    prompt = [5] * 60
    assert len(generate(model, tokenizer, [prompt], max_new_tokens=4).tokens[0]) <= 4
    with pytest.raises(OptionError, match="65 tokens, the model has 64 positions"):
        generate(model, tokenizer, [prompt, [5]], max_new_tokens=5)

    class Long(ToyTask):
        def prompt(self, problem: Any) -> list[dict[str, str]]:
            return [{"role": "user", "content": "5 " * 70}]

    with pytest.raises(OptionError, match="the model has 64 positions"):
        train_sft(model, tokenizer, Long(), SFTConfig(steps=1, batch_size=2))


def test_needs_are_those_of_the_rendered_conversations() -> None:
    tokenizer, task = toy_tokenizer(), ToyTask()
    # "<s> 1 2 3 4 >", "yes 1 3 </s>", "again >".
    needs = Needs.of(tokenizer, task, [ToyProblem((1, 2)), ToyProblem((1, 2, 3, 4)), ToyProblem((5, 6))])
    assert (needs.question, needs.answer, needs.turns) == (6, 4, 3)
    assert needs.turn == 4 + 2 and needs.example == 6 + 4 + 2 + 4
    whole = 6 + 4 + 2 * 6
    needs.check(family_model("gpt2", max_position_embeddings=whole), Path("m"), tokenizer, examples=True)
    with pytest.raises(
        OptionError, match=f"3 turns take up to {whole} tokens.*{whole - 1} pos.*turns=2 fits"
    ):
        needs.check(
            family_model("gpt2", max_position_embeddings=whole - 1), Path("m"), tokenizer, examples=True
        )
    short = family_model("gpt2", max_position_embeddings=12)
    with pytest.raises(OptionError, match="16 tokens, the model has 12"):
        needs.check(short, Path("m"), tokenizer, examples=True)
    with pytest.raises(OptionError, match="turns=1 fits"):
        needs.check(short, Path("m"), tokenizer, examples=False)
    with pytest.raises(
        CheckpointError, match=rf"as id {needs.largest}, its embedding has {needs.largest} rows"
    ):
        needs.check(family_model("llama", vocab_size=needs.largest), Path("m"), tokenizer, examples=True)
    needs.check(family_model("llama", vocab_size=needs.largest + 1), Path("m"), tokenizer, examples=True)


@pytest.mark.parametrize("command", ["track", "eval"])
@pytest.mark.parametrize(
    ("kind", "settings", "numbers"),
    [("opt", {"vocab_size": 260}, ["64"]), ("llama", {"vocab_size": 200}, ["200"])],
)
def test_commands_refuse_what_does_not_fit_and_leave_no_folder(
    command: str, kind: str, settings: dict[str, int], numbers: list[str], tmp_path: Path
) -> None:
    folder, out = tmp_path / "model", tmp_path / "run"
    family_model(kind, **settings).save_pretrained(folder)
    byte_tokenizer("<e>").save_pretrained(folder)
    arguments = [command, "--model", str(folder), "--deals", "2", "--device", "cpu", "--turns", "1"]
    arguments += ["--out", str(out), "--modules", "mlp"] if command == "track" else []
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and not out.exists(), result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(lines) == 1 and str(folder) in lines[0] and all(number in lines[0] for number in numbers)
