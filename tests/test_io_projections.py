"""Projections found by name: the layouts of real architectures, their parts put to work, and the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from rlspec.errors import OptionError, ProjectionError, TensorError
from rlspec.io.projections import MODULES, Projection, check_finite, find_projections, parse_modules

TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
GQA: dict[str, Any] = {**TINY, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}


def _model(config: Any) -> Any:
    with torch.device("cpu"):
        return transformers.AutoModelForCausalLM.from_config(config).float()


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _read(model: Any, projection: Projection) -> torch.Tensor:
    weight = model.state_dict()[projection.tensor]
    weight = weight.T if projection.transposed else weight
    return weight if projection.rows is None else weight[projection.rows]


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


def test_gpt_neox_refuses_its_interleaved_qkv_but_finds_the_rest() -> None:
    model = _model(transformers.GPTNeoXConfig(**TINY, intermediate_size=24))
    with pytest.raises(ProjectionError, match=r"query_key_value.*interleaves"):
        find_projections(_shapes(model), "q")
    found = find_projections(_shapes(model), "o,mlp,embed,lm_head")
    assert [p.module for p in found if p.layer == 1] == ["o", "mlp", "mlp"]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_finite(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    check_finite("w", tensor)
    tensor[2, 4] = bad
    with pytest.raises(TensorError, match="w: 1 of 15 values are NaN or infinite"):
        check_finite("w", tensor)
    check_finite("ids", torch.zeros(2, dtype=torch.int64))
