"""Small checkpoints of many naming schemes, and the dense formulas that restored ones are held against."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 48,
    "intermediate_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}
_FALCON = {k: v for k, v in SIZES.items() if k != "intermediate_size"}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "tied llama": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "gpt2-untied": lambda: transformers.GPT2Config(**_GPT2, tie_word_embeddings=False),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "bloom": lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=48),
    "falcon": lambda: transformers.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-7b": lambda: transformers.FalconConfig(**_FALCON, multi_query=True),
}


def save_model(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Any:
    """A random model of that kind in a Hugging Face folder; larger weights than usual, and no zero biases."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return model


def tune(base: Path, tuned: Path, *, size: float = 1e-2, seed: int = 1) -> None:
    """A copy of a checkpoint whose every tensor has moved by ``size`` of its norm."""
    shutil.copytree(base, tuned)
    draw = torch.Generator().manual_seed(seed)
    for path in sorted(tuned.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        tensors = {}
        for name, tensor in load_file(path).items():
            noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
            moved = tensor.double() + size * tensor.double().norm() / noise.norm().clamp_min(1e-30) * noise
            tensors[name] = moved.to(tensor.dtype)
        save_file(tensors, path, metadata=metadata)


def pair(folder: Path, kind: str = "llama", **options: Any) -> tuple[Path, Path]:
    base, tuned = folder / "base", folder / "tuned"
    save_model(base, kind, **options)
    tune(base, tuned)
    return base, tuned


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts(kind: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Views of the q, k and v matrices (out, in) in a stored tensor, by the layout that the model's code has."""
    if name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight")):
        return {name[-13]: tensor}
    if name.endswith("qkv_proj.weight"):  # 4 heads of 16 for q, 2 for k and for v
        return {"q": tensor[:64], "k": tensor[64:96], "v": tensor[96:]}
    if name.endswith("attn.c_attn.weight"):
        return dict(zip("qkv", tensor.T.split(64)))
    if name.endswith("query_key_value.weight"):
        if kind == "falcon":
            heads = tensor.view(2, 4, 16, 64)
            return {"q": heads[:, :2], "k": heads[:, 2], "v": heads[:, 3]}
        if kind == "falcon-7b":
            return {"q": tensor[:64], "k": tensor[64:80], "v": tensor[80:]}
        heads = tensor.view(4, 3, 16, 64)
        return {"q": heads[:, 0], "k": heads[:, 1], "v": heads[:, 2]}
    return {}


def expected(
    kind: str, base: Tensors, tuned: Tensors, formula: Callable[[Tensor, Tensor], Tensor]
) -> Tensors:
    """The tuned tensors in float64, with ``formula(W_b, W_t)`` in place of every q, k and v matrix."""
    result = {name: tensor.double().clone() for name, tensor in tuned.items()}
    for name in result:
        there = parts(kind, name, base[name].double())
        for label, view in parts(kind, name, result[name]).items():
            w_b, w_t = there[label].reshape(-1, 64), view.reshape(-1, 64)
            view.copy_(formula(w_b, w_t.clone()).reshape(view.shape))
    return result


def svd_formula(
    start: int | float, stop: int | float, *, left_values: str = "tuned"
) -> Callable[[Tensor, Tensor], Tensor]:
    """W_t - U_t S_t V_tᵀ + U_b S V_bᵀ over the indices [start, stop), given as numbers or as shares of r."""

    def formula(base: Tensor, tuned: Tensor) -> Tensor:
        ub, sb, vb = torch.linalg.svd(base, full_matrices=False)
        ut, st, vt = torch.linalg.svd(tuned, full_matrices=False)
        low, high = (x if isinstance(x, int) else round(x * len(sb)) for x in (start, stop))
        i = slice(low, high)
        if left_values == "values only":
            return tuned + (ut[:, i] * (sb - st)[i]) @ vt[i]
        return (
            tuned - (ut[:, i] * st[i]) @ vt[i] + (ub[:, i] * (sb if left_values == "base" else st)[i]) @ vb[i]
        )

    return formula


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = copy.copy(load_file(path))
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
