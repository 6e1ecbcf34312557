"""Which tensors of a checkpoint are the q, k, v, o, mlp, embed and lm_head matrices, by the names they carry.

The architectures are told apart by tensor names and shapes, so that a module in memory and a checkpoint on
disk give the same answer; the heads of a fused ``query_key_value`` must be read from the configuration.
Known layouts: Llama, Qwen, Mistral, Gemma and their kin (separate matrices), Phi-3 (fused ``qkv_proj`` and
``gate_up_proj``), OPT, GPT-2 (``Conv1D``, transposed and fused), GPT-J, GPT-NeoX, BLOOM and Falcon (q, k and v
interleaved by head). Other models inside a multimodal one are left out (`rlspec.io.stacks`); the language model is
found under any prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlspec.errors import OptionError, ProjectionError, TensorError
from rlspec.io.files import read_json_object
from rlspec.io.fused import (
    Config,
    Part,
    Rows,
    Shape,
    consecutive,
    gpt2_qkv,
    phi3_qkv,
    query_key_value,
)
from rlspec.io.quantised import unknown_scheme
from rlspec.io.stacks import LanguageModel, Stack, tell_apart, text_config

if TYPE_CHECKING:  # it needs the compiled extension, which tensors in memory do not
    from rlspec.io.index import CheckpointIndex

#: The module names that may be asked for, in the order in which results list them.
MODULES = ("q", "k", "v", "o", "mlp", "embed", "lm_head")
_GROUPS = {"attn": ("q", "k", "v", "o"), "all": MODULES}


@dataclass(frozen=True)
class Projection:
    """One matrix (out × in) inside a checkpoint; `take` and `put` move it out of its tensor and back."""

    name: str  #: unique label; a part of a fused tensor carries its part, "…qkv_proj.weight[q]"
    tensor: str  #: the full name of the tensor that holds it
    module: str  #: one of `MODULES`
    layer: int | None  #: index of the decoder layer; None for embed and lm_head
    rows: Rows | None = None  #: the output rows of a fused tensor that are this matrix, in order
    transposed: bool = False  #: stored as (in, out), as GPT-2's Conv1D does
    head: int | None = None  #: which attention head it is of q, k, v or o; None for a whole matrix
    columns: slice | None = None  #: the input columns that are this matrix, as of a head of o

    def shape(self, stored: Shape) -> tuple[int, int]:
        """(out, in) of the matrix whose tensor is stored in the shape given."""
        rows, columns = reversed(stored) if self.transposed else stored
        return (
            rows if self.rows is None else sum(_length(s) for s in self._slices()),
            columns if self.columns is None else _length(self.columns),
        )

    def take(self, tensor: Tensor) -> Tensor:
        """This matrix (out, in) from its whole tensor; a view unless its rows are scattered."""
        return self.rows_of(self.columns_of(tensor.mT if self.transposed else tensor))

    def rows_of(self, whole: Tensor) -> Tensor:
        """The rows of this matrix from a tensor (out, …) that has those of all; a view unless they are scattered."""
        if self.rows is None:
            return whole
        parts = [whole[rows] for rows in self._slices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def columns_of(self, whole: Tensor) -> Tensor:
        """The columns of this matrix from a tensor (…, in) that has those of all; a view."""
        return whole if self.columns is None else whole[:, self.columns]

    def put(self, tensor: Tensor, matrix: Tensor) -> None:
        """Write the matrix (out, in) into its place in the whole tensor; nothing else there is touched."""
        whole = self.columns_of(tensor.mT if self.transposed else tensor)
        if self.rows is None:
            whole.copy_(matrix)
            return
        start = 0
        for rows in self._slices():
            whole[rows].copy_(matrix[start : start + _length(rows)])
            start += _length(rows)

    def _slices(self) -> tuple[slice, ...]:
        assert self.rows is not None
        return (self.rows,) if isinstance(self.rows, slice) else self.rows


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


# Tensor-name endings after the layer index -> module. One line per naming family.
_ATTENTION = r"(?:self_attn|cross_attn|attn|attention|self_attention|attn\.attention)"
_SEPARATE = {
    "q": rf"{_ATTENTION}\.q_proj",
    "k": rf"{_ATTENTION}\.k_proj",
    "v": rf"{_ATTENTION}\.v_proj",
    "o": rf"{_ATTENTION}\.(?:o_proj|out_proj|dense)",
    "mlp": r"(?:mlp|block_sparse_moe)\.(?:.+\.)?(?:gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"|mlp\.(?:fc1|fc2|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h)|fc1|fc2",
}
# The same for tensors that hold several modules or several matrices of one.
_FUSED = {
    r"(?:.+\.)?(?:self_)?attn\.qkv_proj": ("q", "k", "v"),
    r"attn\.c_attn": ("q", "k", "v"),
    r"(?:self_)?attention\.query_key_value": ("q", "k", "v"),
    r"mlp\.gate_up_proj": ("mlp",),
}
_CONV1D = {"o": r"attn\.c_proj", "mlp": r"mlp\.c_(?:fc|proj)"}
_CONV1D_ENDINGS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_FUSED_EXPERTS = re.compile(r"mlp\.experts\.\w+_proj(?:\.weight)?")
_EMBED = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_LM_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")


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
    names_to_shapes: Mapping[str, Shape],
    modules: str | Iterable[str] = ("q", "k", "v"),
    config: Config | None = None,
) -> list[Projection]:
    """The projections of the wanted modules, sorted by layer, then in the order of `MODULES`.

    A model whose output embedding is tied to its input embedding has no ``lm_head`` in its checkpoint; where
    ``embed`` is wanted too, that matrix stands for both.

    Args:
        names_to_shapes: shape of every tensor in the checkpoint.
        modules: as `parse_modules` takes them.
        config: what `read_config` found; needed by a fused ``query_key_value``, and to tell the language model from
            others beside it.

    Raises:
        OptionError: an unknown module name.
        ProjectionError: one of the modules is not found at all; or it is, in a layout that is not determined: a
            fused ``query_key_value`` without the number of heads, and experts fused into one three-dimensional
            tensor. Or it is stored in a quantised form that is not known.
    """
    wanted = parse_modules(modules)
    model = language_model(names_to_shapes, config)
    for weight, told in unknown_scheme(names_to_shapes).items():
        if model.holds(weight) and set(modules_in(weight, (1, 1))) & set(wanted):
            raise ProjectionError(
                f"{told} belongs to quantised weights of a scheme that is not known (GPTQ, AWQ, bitsandbytes, packed "
                "integers); start from weights of 16 or 32 bits, or dequantise them first; adapters trained on them "
                "(QLoRA) are measured as saved, against the base in 16 bits"
            )
    found = [
        projection
        for name in names_to_shapes
        if model.holds(name)
        for projection in projections_of(name, names_to_shapes, config, wanted)
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


def language_model(names_to_shapes: Mapping[str, Shape], config: Config | None = None) -> LanguageModel:
    """The part of a checkpoint that is the language model.

    Args:
        names_to_shapes: shape of every tensor in the checkpoint.
        config: what `read_config` found; tells the language model's layers from those of other models.
    """
    stacks: dict[str, Stack] = {}
    for name, shape in names_to_shapes.items():
        if match := _LAYER.search(name):
            prefix = name[: match.start(1)]
            known = tuple(shape) if modules_in(name, shape) else None
            stacks.setdefault(prefix, Stack(prefix)).add(int(match[1]), known)
    return tell_apart(stacks.values(), config)


def model_of(index: CheckpointIndex) -> LanguageModel:
    """The language model of a checkpoint on disk."""
    shapes = {name: tuple(entry.shape) for name, entry in index.tensors.items()}
    return language_model(shapes, read_config(index.path))


def layer_of(name: str) -> int | None:
    """The index of the decoder layer that a tensor belongs to, None where its name tells of none."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def modules_in(name: str, shape: Shape) -> tuple[str, ...]:
    """The modules that a tensor's name says it holds, () where it says nothing, in whatever part of the model."""
    if _EMBED.search(name):
        return ("embed",)
    if _LM_HEAD.search(name):
        return ("lm_head",)
    match = _LAYER.search(name)
    if match is None:
        return ()
    if len(shape) == 3 and _FUSED_EXPERTS.fullmatch(match[2]):
        return ("mlp",)
    if not match[2].endswith(".weight") or len(shape) != 2:
        return ()
    stem = match[2].removesuffix(".weight")
    for patterns in (_SEPARATE, _CONV1D):
        for module, pattern in patterns.items():
            if re.fullmatch(pattern, stem):
                return (module,)
    return next((modules for pattern, modules in _FUSED.items() if re.fullmatch(pattern, stem)), ())


def conv1d_layer(name: str) -> str | None:
    """The prefix of the layer of a matrix that GPT-2 and its kin name as they do their ``Conv1D``; None for others."""
    stem = name.removesuffix(".weight")
    return next((stem.removesuffix(ending) for ending in _CONV1D_ENDINGS if stem.endswith(ending)), None)


def projections_of(
    name: str, shapes: Mapping[str, Shape], config: Config | None = None, wanted: Iterable[str] = MODULES
) -> list[Projection]:
    """The projections of the wanted modules that one tensor holds: none, itself, or parts of it.

    Raises:
        ProjectionError: it holds one of them in a layout that is not determined.
    """
    shape = tuple(shapes[name])
    modules = set(modules_in(name, shape)) & set(wanted)
    if not modules:
        return []
    layer = layer_of(name)
    if len(shape) == 3:
        raise ProjectionError(
            f"{name}: experts fused into one tensor {shape} are not supported; ask for other modules than mlp"
        )
    stem = name.removesuffix(".weight")
    transposed = conv1d_layer(name) is not None
    parts = _parts(name, stem, shape, shapes, config)
    if parts is None:
        return [Projection(name, name, modules.pop(), layer, transposed=transposed)]
    return [
        Projection(f"{name}[{part.label}]", name, part.module, layer, part.rows, transposed)
        for part in parts
        if part.module in modules
    ]


def _parts(
    name: str, stem: str, shape: Shape, shapes: Mapping[str, Shape], config: Config | None
) -> list[Part] | None:
    """The parts of a fused tensor; None for one that is not fused."""
    if stem.endswith("attn.qkv_proj"):
        return phi3_qkv(name, shape, shapes)
    if stem.endswith("mlp.gate_up_proj"):
        return consecutive([("gate", "mlp", shape[0] // 2), ("up", "mlp", shape[0] // 2)])
    if stem.endswith("attn.c_attn"):
        return gpt2_qkv(name, shape)
    if stem.endswith(".query_key_value"):
        return query_key_value(name, shape, config)
    return None


def read_config(checkpoint: Path) -> Config | None:
    """The config.json beside a checkpoint's weights, its text part where it has several; None if there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = config_file(checkpoint)
    if not path.is_file():
        return None
    return text_config(read_json_object(path))


def config_file(checkpoint: Path) -> Path:
    """Where the config.json of a checkpoint's folder, or of the folder of its only file, would be."""
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"


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
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # not every float8 type has what follows
    if tensor.numel() == 0 or (not tensor.is_complex() and _bounded(tensor)):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise TensorError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")


def _bounded(tensor: Tensor) -> bool:
    """Whether all entries are finite, in one pass without a mask: NaN makes both extremes NaN."""
    return all(math.isfinite(extreme) for extreme in torch.stack(torch.aminmax(tensor)).tolist())


def _not_found(module: str, names: Mapping[str, Shape]) -> str:
    example = next((name for name in names if _LAYER.search(name)), next(iter(names), "no tensor at all"))
    return (
        f"no {module} projection found among {len(names)} tensors (the model names them like {example!r}); "
        "the names known are those of Llama, Qwen, Mistral, Gemma, Phi-3, OPT, GPT-2, GPT-J, GPT-NeoX, BLOOM and Falcon"
    )


def _order(projection: Projection) -> tuple[float, int, str]:
    """embed first, then layer by layer, lm_head last."""
    outside = float("inf") if projection.module == "lm_head" else -1.0
    layer = outside if projection.layer is None else projection.layer
    return layer, MODULES.index(projection.module), projection.name
