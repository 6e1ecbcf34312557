"""The dtypes of safetensors files and of torch."""

from __future__ import annotations

import torch

from rlspec.errors import CheckpointError
from rlspec.io.index import TensorEntry

_LONGEST = (1 << 63) - 1
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
#: as safetensors spells it -> torch; those that the installed torch has
TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, there) for name, there in _TORCH_NAMES.items() if hasattr(torch, there)
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The dtype of a tensor on disk.

    Raises:
        CheckpointError: torch has no such dtype (packed 4- and 6-bit floats), or no axis as long as one of these.
    """
    if any(size > _LONGEST for size in entry.shape):  # an empty tensor may claim that
        raise CheckpointError(
            f"{entry.shard}: {entry.name!r} has shape {list(entry.shape)}, torch has axes of at most {_LONGEST}"
        )
    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{entry.shard}: {entry.name!r} has dtype {entry.dtype}, which torch {torch.__version__} does not have"
        )
    return TORCH_DTYPES[entry.dtype]


def stored_name(dtype: torch.dtype) -> str:
    """A torch dtype as safetensors spells it.

    Raises:
        CheckpointError: the format has no such dtype.
    """
    if dtype not in _NAMES:
        raise CheckpointError(f"safetensors files cannot hold {dtype}")
    return _NAMES[dtype]
