"""Which tensors of a checkpoint are the q, k, v, o, mlp, embed and lm_head matrices, by the names they carry.

The architectures are told apart by tensor names and shapes alone, so that a module in memory and a
checkpoint on disk give the same answer. Known layouts: Llama, Qwen, Mistral, Gemma and their kin (separate
matrices), Phi-3 (fused ``qkv_proj`` and ``gate_up_proj``), OPT, GPT-2 (``Conv1D``, transposed and fused) and
GPT-NeoX (its fused ``query_key_value`` is refused, see `find_projections`). Vision and audio towers of
multimodal models are left out; the language model inside is found under any prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.errors import OptionError, ProjectionError, TensorError

Shape = tuple[int, ...]

#: The module names that may be asked for, in the order in which results list them.
MODULES = ("q", "k", "v", "o", "mlp", "embed", "lm_head")
_GROUPS = {"attn": ("q", "k", "v", "o"), "all": MODULES}


@dataclass(frozen=True)
class Projection:
    """One matrix (out × in) inside a checkpoint.

    To get it from the tensor called ``tensor``: transpose if ``transposed``, then take ``rows`` unless None.
    """

    name: str  #: unique label; a part of a fused tensor carries its part, "…qkv_proj.weight[q]"
    tensor: str  #: the full name of the tensor that holds it
    module: str  #: one of `MODULES`
    layer: int | None  #: index of the decoder layer; None for embed and lm_head
    rows: slice | None = None  #: the output rows of a fused tensor that are this matrix
    transposed: bool = False  #: stored as (in, out), as GPT-2's Conv1D does


# Tensor-name endings after the layer index -> module. One line per naming family.
_SEPARATE = {
    "q": r"(?:self_attn|cross_attn|attn|attention)\.q_proj",
    "k": r"(?:self_attn|cross_attn|attn|attention)\.k_proj",
    "v": r"(?:self_attn|cross_attn|attn|attention)\.v_proj",
    "o": r"(?:self_attn|cross_attn|attn|attention)\.(?:o_proj|out_proj|dense)",
    "mlp": r"(?:mlp|block_sparse_moe)\.(?:.+\.)?(?:gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"|mlp\.(?:fc1|fc2|dense_h_to_4h|dense_4h_to_h)|fc1|fc2",
}
_CONV1D = {"o": r"attn\.c_proj", "mlp": r"mlp\.c_(?:fc|proj)"}
_EMBED = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in)\.weight$")
_LM_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")
_TOWERS = re.compile(
    r"(?:^|\.)(?:vision_model|vision_tower|vision_encoder|visual|image_encoder|audio_tower|audio_model"
    r"|multi_modal_projector|mtp)\."
)


def parse_modules(modules: str | Iterable[str]) -> tuple[str, ...]:
    """Names in `MODULES` order, from ``"q,k,v"``, ``"attn"`` (q,k,v,o), ``"all"`` or an iterable of those.

    Raises:
        OptionError: none given, or one that is not known; the message lists the valid ones.
    """
    names = modules.split(",") if isinstance(modules, str) else list(modules)
    wanted: set[str] = set()
    for name in (str(n).strip() for n in names):
        if name in _GROUPS:
            wanted.update(_GROUPS[name])
        elif name in MODULES:
            wanted.add(name)
        else:
            raise OptionError(f"unknown module {name!r}; valid: {', '.join((*MODULES, *_GROUPS))}")
    if not wanted:
        raise OptionError(f"no module named; valid: {', '.join((*MODULES, *_GROUPS))}")
    return tuple(module for module in MODULES if module in wanted)


def find_projections(
    names_to_shapes: Mapping[str, Shape], modules: str | Iterable[str] = ("q", "k", "v")
) -> list[Projection]:
    """The projections of the wanted modules, sorted by layer, then in the order of `MODULES`.

    A model whose output embedding is tied to its input embedding has no ``lm_head`` in its checkpoint; where
    ``embed`` is wanted too, that matrix stands for both.

    Args:
        names_to_shapes: shape of every tensor in the checkpoint.
        modules: as `parse_modules` takes them.

    Raises:
        OptionError: an unknown module name.
        ProjectionError: one of the modules is not found at all; or it is, in a layout that shapes do not
            determine: fused ``query_key_value`` (GPT-NeoX, BLOOM and Falcon interleave the heads in different
            ways), and experts fused into one three-dimensional tensor.
    """
    wanted = parse_modules(modules)
    found = [
        projection
        for name, shape in names_to_shapes.items()
        if not _TOWERS.search(name)
        for projection in _of_tensor(name, tuple(shape), wanted, names_to_shapes)
    ]
    present = {projection.module for projection in found}
    for module in wanted:
        if module in present or (module == "lm_head" and "embed" in present):
            continue
        if module == "lm_head":
            raise ProjectionError(
                "no lm_head in this model: it is tied to the input embedding, ask for embed"
            )
        raise ProjectionError(_not_found(module, names_to_shapes))
    return sorted(found, key=_order)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        name: what the message calls the tensor.
        tensor: any shape, any dtype; integers pass.

    Raises:
        TensorError: some values are not finite; the message names the tensor and counts them.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise TensorError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")


def _of_tensor(
    name: str, shape: Shape, wanted: tuple[str, ...], shapes: Mapping[str, Shape]
) -> list[Projection]:
    """The wanted projections that one tensor holds: none, itself, or parts of it."""
    if _EMBED.search(name):
        return [Projection(name, name, "embed", None)] if "embed" in wanted else []
    if _LM_HEAD.search(name):
        return [Projection(name, name, "lm_head", None)] if "lm_head" in wanted else []
    match = _LAYER.search(name)
    if match is None:
        return []
    layer, rest = int(match[1]), match[2]
    if "mlp" in wanted and len(shape) == 3 and re.fullmatch(r"mlp\.experts\.\w+_proj(?:\.weight)?", rest):
        raise ProjectionError(
            f"{name}: experts fused into one tensor {shape} are not supported; ask for other modules than mlp"
        )
    if not rest.endswith(".weight") or len(shape) != 2:
        return []
    stem = rest.removesuffix(".weight")
    for module in wanted:
        if re.fullmatch(_SEPARATE.get(module, "(?!)"), stem):
            return [Projection(name, name, module, layer)]
        if re.fullmatch(_CONV1D.get(module, "(?!)"), stem):
            return [Projection(name, name, module, layer, transposed=True)]
    return _of_fused(name, shape, stem, layer, wanted, shapes)


def _of_fused(
    name: str, shape: Shape, stem: str, layer: int, wanted: tuple[str, ...], shapes: Mapping[str, Shape]
) -> list[Projection]:
    """The wanted parts of a fused tensor."""
    parts: list[tuple[str, str, int]]  # (label, module, rows)
    transposed = False
    if stem.endswith("attn.qkv_proj"):
        parts = _qkv_parts(name, shape, shapes)
    elif stem == "mlp.gate_up_proj":
        parts = [("gate", "mlp", shape[0] // 2), ("up", "mlp", shape[0] // 2)]
    elif stem == "attn.c_attn":
        if shape[1] != 3 * shape[0]:
            raise ProjectionError(f"{name}: expected a fused (n, 3n) Conv1D as in GPT-2, found {shape}")
        transposed = True
        parts = [(module, module, shape[1] // 3) for module in "qkv"]
    elif stem.endswith(".query_key_value") and set("qkv") & set(wanted):
        raise ProjectionError(
            f"{name}: fused query_key_value interleaves the heads in an order that its shape does not tell; "
            "ask for o, mlp or embed, or convert the checkpoint to separate q, k and v"
        )
    else:
        return []
    projections = []
    start = 0
    for label, module, rows in parts:
        if module in wanted:
            rows_slice = slice(start, start + rows)
            projections.append(Projection(f"{name}[{label}]", name, module, layer, rows_slice, transposed))
        start += rows
    return projections


def _qkv_parts(name: str, shape: Shape, shapes: Mapping[str, Shape]) -> list[tuple[str, str, int]]:
    """Phi-3's q, k, v rows: q has as many as o_proj has inputs, k and v share the rest (grouped queries)."""
    output = shapes.get(name.replace("qkv_proj", "o_proj"))
    if output is None or len(output) != 2:
        raise ProjectionError(f"{name}: cannot be split into q, k and v without its o_proj")
    q = output[1]
    rest = shape[0] - q
    if rest <= 0 or rest % 2:
        raise ProjectionError(f"{name}: {shape[0]} rows do not split into q ({q}, by o_proj) and equal k, v")
    return [("q", "q", q), ("k", "k", rest // 2), ("v", "v", rest // 2)]


def _not_found(module: str, names: Mapping[str, Shape]) -> str:
    example = next((name for name in names if _LAYER.search(name)), next(iter(names), "no tensor at all"))
    return (
        f"no {module} projection found among {len(names)} tensors (the model names them like {example!r}); "
        "the names known are those of Llama, Qwen, Mistral, Gemma, Phi-3, OPT, GPT-2 and GPT-NeoX"
    )


def _order(projection: Projection) -> tuple[float, int, str]:
    """embed first, then layer by layer, lm_head last."""
    outside = float("inf") if projection.module == "lm_head" else -1.0
    layer = outside if projection.layer is None else projection.layer
    return layer, MODULES.index(projection.module), projection.name
