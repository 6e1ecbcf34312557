"""Weights that are stored as 8-bit codes with scales, and the schemes that are refused.

A scaled fp8 weight W (m, n) is codes * scale, with the scale beside it under the weight's name and ``_scale_inv`` or
``_scale`` (both are factors, whatever the name says). One scale stands for the whole matrix, for a row, or for a
block of (block_m, block_n) entries, the last ones of each axis cut off by the matrix: the schemes of DeepSeek and
Qwen (``weight_scale_inv``), compressed-tensors, FBGEMM and ModelOpt (``weight_scale``), and the FP8Linear of
transformers. Everything else that lies beside a weight belongs to a scheme that is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlspec.errors import TensorError

_SCALES = ("_scale", "_scale_inv")
# Tensors that only quantised checkpoints have: GPTQ and AWQ, bitsandbytes, compressed-tensors, ModelOpt, HQQ, AQLM;
# scaled fp8; and experts fused into one tensor, in fp8 and in MXFP4.
_ENDINGS = re.compile(
    r"\.(?:qweight|qzeros|SCB|absmax|quant_map|W_q|codebooks|weight_format|weight_packed|weight_shape"
    r"|weight_g_idx|weight_zero_point|weight_global_scale|weight_scale(?:_inv|_2)?)$"
    r"|\.weight\.quant_state\.|\.experts\.\w+_(?:scale_inv|scale|blocks|scales)$"
)
# What may lie beside the codes of a weight: "<owner>.weight_…" and "<owner>.weight.…", or one of these endings. The
# scales of activations (input_scale, activation_scale) say nothing about the weight.
_BESIDE_WEIGHT = re.compile(r"(.+\.weight)(?:_\w+|\..+)")
_BESIDE_OWNER = re.compile(r"(.+)\.(?:qweight|qzeros|SCB|absmax|quant_map|W_q|codebooks|scales?|zeros|g_idx)")
_BESIDE_EXPERTS = re.compile(r"(.+\.experts\.\w+?)_scale(?:_inv)?")
_ADVICE = "start from weights of 16 or 32 bits, or dequantise them first"


def is_quantised(name: str) -> bool:
    """Whether only quantised weights come with a tensor of this name; a scaled fp8 weight's scale counts too."""
    return _ENDINGS.search(name) is not None


def unknown_scheme(names: Iterable[str]) -> dict[str, str]:
    """The weights that the names show to be stored in a scheme that is not known, each with the tensor that tells.

    A weight of that name need not be there: packed ones carry another.
    """
    found: dict[str, str] = {}
    for name in names:
        if is_quantised(name) and not name.endswith(_SCALES):
            found.setdefault(_weight_of(name) or name, name)
    return found


def companions(names: Iterable[str]) -> dict[str, list[str]]:
    """Each weight's name with those of the tensors that may say how its codes are to be read."""
    found: dict[str, list[str]] = {}
    for name in names:
        weight = _weight_of(name)
        if weight is not None:
            found.setdefault(weight, []).append(name)
    return found


def _weight_of(name: str) -> str | None:
    """The weight that a tensor's name says it lies beside."""
    if match := _BESIDE_WEIGHT.fullmatch(name) or _BESIDE_EXPERTS.fullmatch(name):
        return match[1]
    match = _BESIDE_OWNER.fullmatch(name)
    return None if match is None else f"{match[1]}.weight"


def scales_of(name: str, beside: Iterable[str]) -> list[str]:
    """Which of the tensors beside a weight are its scales; codes of a known scheme have one."""
    return [n for n in beside if n in (name + _SCALES[0], name + _SCALES[1])]


def block_size(config: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """The block (rows, columns) of one scale that a model's configuration states, None where it states none, or several.

    ``weight_block_size`` in ``quantization_config``, or ``block_structure`` in compressed-tensors' groups.
    """
    quantisation = (config or {}).get("quantization_config")
    if not isinstance(quantisation, Mapping):
        return None
    groups = quantisation.get("config_groups")
    stated: list[Any] = [quantisation.get("weight_block_size")]
    if isinstance(groups, Mapping):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        stated += [w.get("block_structure") for w in weights if isinstance(w, Mapping)]
    sizes = {tuple(size) for size in stated if _is_block(size)}
    return sizes.pop() if len(sizes) == 1 else None


def _is_block(size: object) -> bool:
    return isinstance(size, Sequence) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)


def dequantised(
    name: str,
    stored: Tensor,
    beside: Collection[str],
    load: Callable[[str], Tensor],
    block: tuple[int, int] | None = None,
) -> Tensor:
    """A weight as numbers: itself where it is stored as such, codes * scale in float32 where a scale lies beside it,
    and what a tensor that dequantises itself says.

    Args:
        name: the weight's own.
        stored: what is stored under it, any shape.
        beside: names of the tensors that lie beside it, see `companions`.
        load: reads one of those.
        block: what `block_size` found.

    Raises:
        TensorError: codes of a scheme that is not known, or a scale that does not fit.
    """
    if has_own_scheme(stored):
        return stored.dequantize()
    scales = scales_of(name, beside)
    if stored.is_floating_point() and stored.element_size() > 1:
        told = next((n for n in beside if is_quantised(n)), None)
        if told is not None:
            raise TensorError(
                f"{name}: {stored.dtype} with {told} beside it, a scheme that is not known; {_ADVICE}"
            )
        return stored
    if not stored.is_floating_point():
        raise TensorError(
            f"{name}: expected a floating-point matrix, found {stored.dtype} {tuple(stored.shape)}: codes of "
            f"quantised weights (bitsandbytes, GPTQ, AWQ, int8); {_ADVICE}"
        )
    others = [n for n in beside if n not in scales]
    if others or len(scales) > 1:
        what = ", ".join([*others, *scales])
        raise TensorError(f"{name}: fp8 codes with {what} beside them, a scheme that is not known; {_ADVICE}")
    return stored if not scales else scaled(name, stored, scales[0], load(scales[0]), block)


def has_own_scheme(tensor: Tensor) -> bool:
    """Whether a tensor holds codes and knows itself how to turn them into numbers, as torchao's subclasses do."""
    return type(tensor).dequantize is not Tensor.dequantize


def scaled(
    name: str, codes: Tensor, scale_name: str, scale: Tensor, block: tuple[int, int] | None = None
) -> Tensor:
    """codes * scale in float32, (m, n).

    Args:
        name, scale_name: what messages call the two.
        codes: (m, n), a float8 dtype.
        scale: one number; (m,) or (m, 1), a row's; or (ceil(m / block_m), ceil(n / block_n)). Any floating dtype, or
            uint8, which holds the exponents of powers of two as MXFP8 does (E8M0: 2^(byte - 127)).
        block: the block that the model's configuration states. Where there is none, or it does not fit, the one power
            of two or divisor that does.

    Raises:
        TensorError: another shape, or one that several blocks fit.
    """
    wide, (rows, columns) = scale_grid(name, codes, scale_name, scale, block)
    out = codes.to(torch.float32)
    if wide.shape[1] > 1:
        wide = wide.repeat_interleave(columns, dim=1)[:, : codes.shape[1]]
    if rows == 1 or wide.shape[0] == 1:
        return out.mul_(wide)
    for i, factors in enumerate(wide):
        out[i * rows : (i + 1) * rows].mul_(factors)
    return out


def scale_grid(
    name: str, codes: Tensor, scale_name: str, scale: Tensor, block: tuple[int, int] | None
) -> tuple[Tensor, tuple[int, int]]:
    """A scale as a grid (a, b) in float32, and the block of entries that each of its numbers stands for.

    Arguments and errors are those of `scaled`.
    """
    wide = _as_float32(scale_name, scale)
    shape = tuple(codes.shape)
    problem = f"{scale_name}: {tuple(scale.shape)} does not scale {name} {shape} by rows or blocks"
    if codes.ndim != 2:
        raise TensorError(f"{problem}; only matrices are dequantised")
    if wide.ndim == 1 and wide.numel() == shape[0]:
        wide = wide[:, None]
    if wide.numel() == 1:
        wide = wide.reshape(1, 1)
    if wide.ndim != 2:
        raise TensorError(problem)
    sizes = [
        _axis(size, count, None if block is None else block[i])
        for i, (size, count) in enumerate(zip(shape, wide.shape))
    ]
    if not all(sizes):
        raise TensorError(
            f"{problem}; {'without a' if block is None else 'nor by the'} weight_block_size in config.json"
        )
    rows, columns = (size or 1 for size in sizes)
    return wide, (rows, columns)


def _as_float32(name: str, scale: Tensor) -> Tensor:
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.to(torch.float32) - 127)
    if not scale.is_floating_point():
        raise TensorError(f"{name}: a scale of {scale.dtype} is not known; {_ADVICE}")
    return scale.to(torch.float32)


def _axis(size: int, count: int, stated: int | None) -> int | None:
    """How many entries of an axis share one of its ``count`` scales; None where that is not determined."""
    if count == 1:
        return size
    if stated is not None and -(-size // stated) == count:
        return stated
    fitting = {2**i for i in range(size.bit_length() + 1) if -(-size // 2**i) == count}
    if count and size % count == 0:
        fitting.add(size // count)
    return fitting.pop() if len(fitting) == 1 else None
