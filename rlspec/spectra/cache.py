"""Reference decompositions kept on disk, one file per matrix, found again by the content of the weight.

The key is a hash of the weight's bytes, dtype and shape and of the format's version, so a file serves every
run and every checkpoint that holds the same matrix, and nothing else. A file is written under a temporary
name and renamed: building may be interrupted at any moment and goes on with the matrices that are missing.
Tensors are memory-mapped. A file that is damaged (checksum) or belongs to another matrix (key) is rebuilt.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlspec.io.cache_folder import (
    begin_use,
    changing,
    default_cache_dir,
    entry_path,
    limit_bytes,
    make_room,
    mark_used,
)
from rlspec.io.files import replacing
from rlspec.linalg.factor import reference_factors

_VERSION = 1
# Below this many entries a decomposition takes milliseconds, less than its file would.
MIN_ENTRIES = 1 << 17
_HEADER_BYTES = 1024  # of a file, at most

Factors = tuple[Tensor, Tensor, Tensor]


def cached_factors(weight: Tensor, cache_dir: str | Path | None = None) -> Factors:
    """The thin SVD of a weight, from the cache where it is there and sound, else computed and put there.

    Args:
        weight: (m, n), any floating dtype, finite, contiguous, on the CPU.
        cache_dir: folder of the cache; default :func:`default_cache_dir`.

    Returns:
        U, S, Vh as ``factor.reference_factors`` gives them, row-major and in memory of their own whether they were
        read or computed: how BLAS sums depends on layout and alignment, and a resumed run must get the same bits
        as one that was never stopped. A cache that cannot be written, or is full of what running processes use,
        costs time, not results.

    Raises:
        OptionError: ``$RLSPEC_CACHE_GIB`` is no size.
    """
    if weight.numel() < MIN_ENTRIES:
        return _fresh(reference_factors(weight))
    key = content_key(weight)
    folder = Path(cache_dir if cache_dir is not None else default_cache_dir())
    path = entry_path(folder, key)
    limit_bytes()  # a limit that is none should be told before the work
    with contextlib.suppress(OSError):
        begin_use(folder)
    mark_used(path)
    found = _load(path, key)
    if found is not None:
        return _fresh(found)
    factors = _fresh(reference_factors(weight))
    with contextlib.suppress(OSError, SafetensorError):  # the second is how safetensors tells of the first
        _store(folder, key, factors)
    return factors


def fresh(tensor: Tensor) -> Tensor:
    """A copy laid out row by row, where the allocator puts it."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _fresh(factors: Factors) -> Factors:
    u, s, vh = (fresh(factor) for factor in factors)
    return u, s, vh


def content_key(weight: Tensor) -> str:
    """Hexadecimal hash of the format version, the dtype, the shape and the bytes of a contiguous CPU
    tensor."""
    digest = hashlib.blake2b(f"{_VERSION} {weight.dtype} {tuple(weight.shape)} ".encode(), digest_size=20)
    digest.update(bytes_of(weight))
    return digest.hexdigest()


def _load(path: Path, key: str) -> Factors | None:
    """The factors in a file, or None where it is missing, foreign or damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            described = file.metadata() or {}
            if described.get("key") != key:
                return None
            u, s, vh = (file.get_tensor(name) for name in ("U", "S", "Vh"))
    except (OSError, SafetensorError):
        return None
    return (u, s, vh) if described.get("checksum") == checksum((u, s, vh)) else None


def _store(folder: Path, key: str, factors: Factors) -> None:
    u, s, vh = (t.contiguous() for t in factors)
    path = entry_path(folder, key)
    metadata = {"key": key, "checksum": checksum((u, s, vh))}
    with changing:  # the room that was made is not another thread's
        if not make_room(folder, sum(t.nbytes for t in factors) + _HEADER_BYTES):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as temporary:
            save_file({"U": u, "S": s, "Vh": vh}, temporary, metadata=metadata)


def checksum(tensors: Iterable[Tensor]) -> str:
    """Hexadecimal CRC-32 of the bytes of tensors on the CPU, one after the other."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(bytes_of(tensor), value)
    return f"{value:08x}"


def bytes_of(tensor: Tensor) -> Any:  # a buffer, which Python 3.10 cannot name
    """The bytes of a tensor on the CPU, row by row; a view where it lies so."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
