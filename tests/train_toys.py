"""A model of a few thousand weights, a tokenizer of a few words and a toy task, for trainer tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlspec.models.vocabulary import make_tokenizer
from rlspec.tasks.base import Message, Verdict

WORDS = ("<pad>", "<unk>", "<s>", "</s>", ">", "yes", "no", "again", *map(str, range(10)))


def toy_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' ' + m['content'] + ' >' }}"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
    )
    return tokenizer


def toy_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": 3,
        "bos_token_id": 2,
        "pad_token_id": 0,
        # Wide, so that the model has opinions and mistakes in a distribution show.
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def save_toy_model(folder: Path, **changes: Any) -> Path:
    """A toy model in a Hugging Face folder, with the embedded model's tokenizer: what the commands take."""
    tokenizer = make_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    toy_model(**sizes, **special, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class ToyProblem:
    digits: tuple[int, ...]

    @property
    def key(self) -> tuple[int, ...]:
        return self.digits


class ToyTask:
    """Two or four digits; any answer that begins with "yes" is right."""

    name = "toy"
    shifts = ("none", "long")
    max_turns = 3
    turn_limit_reward = -0.5
    max_answer_tokens = 4

    def sample(self, rng: random.Random, shift: str = "none") -> ToyProblem:
        count = 6 if shift == "long" else rng.choice((2, 4))
        return ToyProblem(tuple(rng.randrange(10) for _ in range(count)))

    def prompt(self, problem: ToyProblem) -> list[Message]:
        return [{"role": "user", "content": " ".join(map(str, problem.digits))}]

    def answer(self, problem: ToyProblem) -> str:
        return " ".join(["yes", *map(str, problem.digits[::2])])

    def verify(self, problem: ToyProblem, answer: str) -> Verdict:
        if answer.split()[:1] == ["yes"]:
            return Verdict(1.0, True, "correct")
        return Verdict(-1.0, False, "wrong", "again")

    def sft_example(self, problem: ToyProblem, rng: random.Random) -> tuple[list[Message], str]:
        return self.prompt(problem), self.answer(problem)


def toy_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 14 tokens."""
    rng = random.Random(seed)
    return [[2, *(rng.randrange(4, len(WORDS)) for _ in range(rng.randint(2, 13)))] for _ in range(count)]


def byte_tokenizer(eos: str, *others: str, template: str | None = None, **special: str) -> Any:
    """One token a byte, then the special tokens: any text can be written, whatever the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, additional_special_tokens=list(others), **special
    )
    tokenizer.chat_template = template
    return tokenizer


def family_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model of one of transformers' families, its biases and norms off their starting values."""
    settings: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        # The same things as older families call them.
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "n_positions": 64,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model
