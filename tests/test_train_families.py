"""Sampling from, and training on, models that remember otherwise than by keys and values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_toys import ToyTask, family_model, toy_tokenizer
from transformers import DynamicCache

from rlspec.train import KLProbe, PPOConfig, SFTConfig, padding, train_ppo, train_sft
from rlspec.train.cache import Reader, keep_rows
from rlspec.train.generate import generate
from rlspec.train.padding import padding_is_inert
from rlspec.train.sft import sft_batch

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}
# Name of the case: (family, its settings).
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("qwen3_5_text", LINEAR),
    "lfm2": ("lfm2", CONVOLUTION),
    "lfm2 with biases": ("lfm2", {**CONVOLUTION, "conv_bias": True}),
    "bamba": ("bamba", {**MAMBA, "mamba_expand": 2, "attn_layer_indices": [1]}),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "falcon-h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}),
}
FAMILIES = {
    "llama": ("llama", {}),
    "sliding window": ("mistral", {"sliding_window": 4}),
    **HYBRIDS,
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1}),
    "minimax": ("minimax", {"layer_types": ["linear_attention", "full_attention"]}),
    "recurrent gemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}),
    "gpt, no cache": ("openai-gpt", {}),
}
SEE_PADDING = {"lfm2 with biases", "recurrent gemma", "rwkv"}
SEE_PADDING_IN_STEPS = {"minimax"}  # read whole, it masks padding; its cached steps are moved by it
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=1)
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [3, 2], [4, 4, 2]] * 3


def build(name: str) -> Any:
    kind, settings = FAMILIES[name]
    model = family_model(kind, **settings)
    model.generation_config.eos_token_id = [1, *range(0, 60, 4)]  # some rows finish early
    return model


def full_logprobs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """float64 (T, V) of each answer position, by one forward pass of one row, without cache or padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_logprobs_are_those_of_one_unpadded_row(name: str) -> None:
    model = build(name)
    batches: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: batches.append(len(out)))
    generator = torch.Generator().manual_seed(0)
    out = generate(model, TOKENIZER, PROMPTS, max_new_tokens=10, generator=generator)
    seen = set(batches[3:])  # but for the measurement of the padding
    for prompt, answer, stored in zip(PROMPTS, out.tokens, out.logprobs):
        wanted = full_logprobs(model, prompt, answer)[range(len(answer)), answer]
        torch.testing.assert_close(torch.tensor(stored).double(), wanted, atol=2e-5, rtol=0)
    assert len({len(answer) for answer in out.tokens}) > 2
    # Finished rows were dropped, or their dropping would not have been tested.
    assert len(seen - {1, max(batches)}) > 0 or name == "minimax"


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    model = build(name)
    ours = generate(model, TOKENIZER, PROMPTS[:4], max_new_tokens=8, temperature=0).tokens
    for prompt, answer in zip(PROMPTS, ours):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert answer == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_measured(name: str) -> None:
    model = build(name)
    prompt = torch.tensor([[5, 6, 7]])
    mask = torch.tensor([[0] * 6 + [1] * 3])
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), prompt], dim=1)
    with torch.no_grad():
        alone = model(prompt, use_cache=False).logits[0, -1]
        behind = Reader(model, mask).logits(padded)[0]
    moved = (alone - behind).abs().max() / alone.abs().max()
    assert (moved < 1e-5) == (name not in SEE_PADDING)
    assert padding_is_inert(model, 0) == (name not in SEE_PADDING | SEE_PADDING_IN_STEPS)


def test_the_sampler_is_wrong_where_visible_padding_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "padding_is_inert", lambda model, pad: True)
    model = build("rwkv")
    out = generate(model, TOKENIZER, PROMPTS, max_new_tokens=4, temperature=0.5)
    off = [
        (full_logprobs(model, prompt, answer)[range(len(answer)), answer] - torch.tensor(stored)).abs().max()
        for prompt, answer, stored in zip(PROMPTS, out.tokens, out.logprobs)
    ]
    assert max(off) > 1e-2


@pytest.mark.parametrize("name", ["jamba", "rwkv", "lfm2 with biases"])
def test_training_is_that_of_unpadded_rows(name: str) -> None:
    kind, settings = FAMILIES[name]
    tokenizer, task = toy_tokenizer(), ToyTask()
    model = family_model(kind, **settings)
    probe = KLProbe(model, tokenizer, task, prompts=8)
    assert probe.measure(model) == 0
    config = SFTConfig(steps=1, batch_size=8, dtype="float32")
    pairs = sft_batch(tokenizer, task, config, 1, frozenset())
    assert len({len(prompt) for prompt, _ in pairs}) > 1
    total = sum(
        -full_logprobs(model, prompt, answer)[range(len(answer)), answer].sum() for prompt, answer in pairs
    )
    loss = train_sft(model, tokenizer, task, config).losses[0]
    assert loss == pytest.approx(float(total) / sum(len(answer) for _, answer in pairs), rel=1e-5)
    # PPO checks by itself that sampled and scored log-probabilities agree.
    settings = PPOConfig(updates=1, turns_per_update=8, mini_batch_size=4, dtype="float32")
    assert train_ppo(model, tokenizer, task, settings).steps == 1


class Forgetful(DynamicCache):
    """A cache with a part that it does not say how to select from."""


def test_rows_stay_where_a_part_of_the_cache_cannot_drop_them() -> None:
    model = build("llama")
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6], [7, 8]]), past_key_values=Forgetful()).past_key_values
    assert type(cache) is Forgetful and not keep_rows(cache, torch.tensor([1]))
    assert cache.layers[0].keys.shape[0] == 2
    assert not keep_rows(object(), torch.tensor([1]))
