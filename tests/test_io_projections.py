"""Projections found by name: the layouts of real architectures, their parts put to work, and the refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlspec.errors import CheckpointError, OptionError, ProjectionError, TensorError
from rlspec.io.projections import (
    MODULES,
    Projection,
    check_finite,
    find_projections,
    layer_of,
    modules_in,
    parse_modules,
    read_config,
)
from rlspec.spectra import SpectralBasis

TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
GQA: dict[str, Any] = {**TINY, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}


def _model(config: Any) -> Any:
    with torch.device("cpu"):
        return transformers.AutoModelForCausalLM.from_config(config).float()


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _read(model: Any, projection: Projection) -> torch.Tensor:
    matrix = projection.take(model.state_dict()[projection.tensor])
    assert tuple(matrix.shape) == projection.shape(tuple(model.state_dict()[projection.tensor].shape))
    return matrix


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_separate_matrices(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **GQA, head_dim=4)
    model = _model(config)
    found = find_projections(_shapes(model), "all")
    per_layer = [p.module for p in found if p.layer == 1]
    assert per_layer == ["q", "k", "v", "o", "mlp", "mlp", "mlp"]
    assert [p.module for p in found if p.layer is None] == ["embed", "lm_head"]
    assert found[0].module == "embed" and found[-1].module == "lm_head"
    assert len({p.name for p in found}) == len(found)
    shapes = {p.module: tuple(_read(model, p).shape) for p in found}
    assert shapes["q"] == (16, 16) and shapes["k"] == shapes["v"] == (8, 16)


def test_phi3_parts_compute_what_the_fused_matrix_does() -> None:
    model = _model(transformers.Phi3Config(**GQA))
    found = {p.name: p for p in find_projections(_shapes(model), "q,k,v,mlp") if p.layer == 0}
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    whole = model.state_dict()[fused]
    parts = [_read(model, found[f"{fused}[{part}]"]) for part in "qkv"]
    assert [len(part) for part in parts] == [16, 8, 8]
    assert torch.equal(torch.cat(parts), whole)
    gate = found["model.layers.0.mlp.gate_up_proj.weight[gate]"]
    assert gate.rows == slice(0, 24) and gate.module == "mlp"


def test_gpt2_parts_give_the_queries_of_the_model() -> None:
    model = _model(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=32))
    found = find_projections(_shapes(model), "all")
    assert [p.module for p in found if p.layer == 0] == ["q", "k", "v", "o", "mlp", "mlp"]
    x = torch.randn(5, 16)
    layer = model.transformer.h[0]
    with torch.no_grad():
        expected = dict(zip("qkv", (layer.attn.c_attn(x) - layer.attn.c_attn.bias).split(16, dim=1)))
        expected["o"] = layer.attn.c_proj(x) - layer.attn.c_proj.bias
        for p in found:
            if p.layer == 0 and p.module in expected:
                got = x @ _read(model, p).T
                torch.testing.assert_close(got, expected[p.module], rtol=1e-5, atol=1e-6)


def test_gpt_neox_parts_are_the_queries_keys_and_values_of_the_model() -> None:
    config = transformers.GPTNeoXConfig(**TINY, intermediate_size=24)
    seen = []

    def spy(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        seen.append((query, key, value))
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("spy", spy)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="spy")
    inputs = []
    fused = model.gpt_neox.layers[0].attention.query_key_value
    fused.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    with torch.no_grad():
        fused.bias.zero_()
        model(torch.arange(5)[None])
    check_parts(model, config, inputs[0][0, :1], [part[0, :, :1] for part in seen[0]])


@pytest.mark.parametrize("family", ["bloom", "falcon new", "falcon multi-query", "falcon old"])
def test_bloom_and_falcon_parts_are_those_of_the_model(family: str) -> None:
    tiny = {"hidden_size": 16, "num_attention_heads": 4, "vocab_size": 32}
    if family == "bloom":
        config: Any = transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=4, vocab_size=32)
    elif family == "falcon new":
        config = transformers.FalconConfig(
            **tiny, num_hidden_layers=2, new_decoder_architecture=True, num_kv_heads=2
        )
    else:
        config = transformers.FalconConfig(**tiny, num_hidden_layers=2, multi_query=family.endswith("query"))
    model = _model(config)
    attention = model.transformer.h[0].self_attention
    x = torch.randn(1, 3, 16)
    with torch.no_grad():
        if family == "bloom":
            attention.query_key_value.bias.zero_()
            split = attention._reshape(attention.query_key_value(x))
        else:
            split = [part.transpose(1, 2) for part in attention._split_heads(attention.query_key_value(x))]
    if family == "falcon new":  # key and value are repeated there for the two heads of a group
        split = [split[0], split[1][:, ::2], split[2][:, ::2]]
    check_parts(model, config, x[0], [part[0] for part in split])


def check_parts(model: Any, config: Any, x: torch.Tensor, heads: list[torch.Tensor]) -> None:
    """The projections of layer 0 map ``x`` (t, n) to the model's own queries, keys and values (heads, t, size)."""
    found = find_projections(_shapes(model), "all", config.to_dict())
    assert [p.module for p in found if p.layer == 1] == ["q", "k", "v", "o", "mlp", "mlp"]
    layer = {p.module: p for p in found if p.layer == 0}
    for module, expected in zip("qkv", heads):
        weight = _read(model, layer[module])
        torch.testing.assert_close(x @ weight.T, expected.transpose(0, 1).flatten(1), rtol=1e-4, atol=1e-6)
    # Written back in another place, a part leaves every other row as it was.
    whole = model.state_dict()[layer["k"].tensor]
    before = whole.clone()
    layer["k"].put(whole, torch.zeros_like(layer["k"].take(whole)))
    assert not layer["k"].take(whole).any()
    for other in "qv":
        assert torch.equal(layer[other].take(whole), layer[other].take(before))


def test_heads_come_from_the_configuration_alone() -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    with pytest.raises(ProjectionError, match=r"query_key_value.*only config.json says; none was found"):
        find_projections({name: (48, 16)}, "q")
    with pytest.raises(ProjectionError, match="model_type 'other' is none whose"):
        find_projections({name: (48, 16)}, "q", {"model_type": "other"})
    with pytest.raises(ProjectionError, match="gives no num_attention_heads"):
        find_projections({name: (48, 16)}, "q", {"model_type": "gpt_neox"})
    with pytest.raises(ProjectionError, match="48 rows do not split into 5 heads"):
        find_projections({name: (48, 16)}, "q", {"model_type": "gpt_neox", "num_attention_heads": 5})
    # What is not asked for needs no heads.
    assert find_projections({name: (48, 16), "gpt_neox.embed_in.weight": (9, 16)}, "embed")


def test_config_beside_the_weights(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "mllama", "text_config": {"n_head": 4}}')
    (tmp_path / "model.safetensors").touch()
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert read_config(place) == {"model_type": "mllama", "n_head": 4, "text_config": {"n_head": 4}}
    for text, named in (("{", "not valid JSON"), ("[]", "expected a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config.json: {named}"):
            read_config(tmp_path)


def test_what_names_say() -> None:
    assert modules_in("model.layers.3.self_attn.qkv_proj.weight", (3, 3)) == ("q", "k", "v")
    assert modules_in("model.layers.3.self_attn.q_proj.bias", (3,)) == ()
    assert modules_in("model.layers.3.mlp.experts.gate_up_proj", (2, 3, 3)) == ("mlp",)
    assert modules_in("model.norm.weight", (3,)) == ()
    assert (layer_of("model.layers.12.mlp.x.weight"), layer_of("model.norm.weight")) == (12, None)


def test_opt() -> None:
    model = _model(
        transformers.OPTConfig(**TINY, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=8)
    )
    found = find_projections(_shapes(model), "attn,mlp")
    assert [p.module for p in found if p.layer == 0] == ["q", "k", "v", "o", "mlp", "mlp"]


@pytest.mark.parametrize(
    ("prefix", "tower"),
    [
        ("language_model.model.", "vision_model.transformer."),  # Mllama, LLaVA
        ("model.language_model.", "model.visual."),  # Qwen2-VL and Mllama as transformers now names them
        ("language_model.model.", "vision_tower.vision_model.encoder."),  # Gemma 3
    ],
)
def test_vision_towers_are_left_out(prefix: str, tower: str) -> None:
    shapes = {
        f"{tower}layers.0.self_attn.q_proj.weight": (8, 8),
        f"{prefix}layers.0.self_attn.q_proj.weight": (16, 16),
        f"{prefix}layers.1.cross_attn.q_proj.weight": (16, 16),
    }
    found = find_projections(shapes, "q")
    assert [(p.tensor, p.layer) for p in found] == [
        (f"{prefix}layers.0.self_attn.q_proj.weight", 0),
        (f"{prefix}layers.1.cross_attn.q_proj.weight", 1),
    ]


def test_layers_are_in_numeric_order() -> None:
    shapes = {f"model.layers.{i}.self_attn.q_proj.weight": (4, 4) for i in (10, 2, 1)}
    assert [p.layer for p in find_projections(shapes, "q")] == [1, 2, 10]


def test_tied_lm_head() -> None:
    shapes = {"model.embed_tokens.weight": (32, 16), "model.layers.0.self_attn.q_proj.weight": (4, 4)}
    assert [p.module for p in find_projections(shapes, "embed,lm_head")] == ["embed"]
    with pytest.raises(ProjectionError, match="tied"):
        find_projections(shapes, "lm_head")


def test_missing_and_unsupported_projections() -> None:
    with pytest.raises(ProjectionError, match=r"no k projection found among 1 tensors"):
        find_projections({"model.layers.0.self_attn.q_proj.weight": (4, 4)}, "q,k")
    with pytest.raises(ProjectionError, match="no tensor at all"):
        find_projections({}, "q")
    with pytest.raises(ProjectionError, match="experts fused"):
        find_projections({"model.layers.0.mlp.experts.gate_up_proj": (2, 4, 4)}, "mlp")
    with pytest.raises(ProjectionError, match=r"24 rows do not split"):
        find_projections(
            {
                "model.layers.0.self_attn.qkv_proj.weight": (24, 8),
                "model.layers.0.self_attn.o_proj.weight": (8, 24),
            },
            "q",
        )


def test_parse_modules() -> None:
    assert parse_modules("v, q,k") == ("q", "k", "v")
    assert parse_modules("attn") == ("q", "k", "v", "o")
    assert parse_modules(["all"]) == MODULES
    with pytest.raises(OptionError, match=r"unknown module 'kv'; valid: q, k, v, o, mlp, embed"):
        parse_modules("q,kv")
    with pytest.raises(OptionError, match="no module named"):
        parse_modules(())


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e5m2],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_finite(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros(3, 5).to(dtype)
    check_finite("w", tensor)
    check_finite("w", tensor[:0])
    tensor[2, 4] = bad
    with pytest.raises(TensorError, match="w: 1 of 15 values are NaN or infinite"):
        check_finite("w", tensor)
    check_finite("ids", torch.zeros(2, dtype=torch.int64))


def test_hybrids_tell_which_layers_hold_the_projections(tmp_path: Path) -> None:
    """LFM2 has attention in some layers and convolutions in the others; Llama is not a hybrid."""
    sizes = {**GQA, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    config = transformers.Lfm2Config(**sizes, block_multiple_of=8)
    model = _model(config)
    told = "only 2 of 4 layers hold q, k, v: 1, 3"
    basis = SpectralBasis.from_model(model, modules="q,k,v", cache_dir=tmp_path)
    assert [p.layer for p in basis.projections if p.module == "q"] == [1, 3]
    assert basis.note == told
    model.save_pretrained(tmp_path / "model")
    assert SpectralBasis.from_checkpoint(tmp_path / "model", cache_dir=tmp_path).note == told
    llama = _model(transformers.LlamaConfig(**GQA))
    assert SpectralBasis.from_model(llama, modules="all", cache_dir=tmp_path).note is None
