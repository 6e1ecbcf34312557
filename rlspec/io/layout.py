"""How the shards of a checkpoint that is written are laid out: the same as those of the one it follows."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from rlspec import _C
from rlspec.errors import CheckpointError
from rlspec.io.dtypes import TORCH_DTYPES, stored_name
from rlspec.io.index import INDEX_FILE, SINGLE_FILE, CheckpointIndex, TensorEntry
from rlspec.io.stream import by_shard


@dataclass(frozen=True)
class Place:
    """Where a changed tensor goes."""

    offset: int  #: first byte in the new shard
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardLayout:
    """One file to write: a header, bytes that are copied, and places for the changed tensors."""

    name: str  #: relative to the folder
    source: Path
    size: int
    header: bytes | None  #: None: the source's own, copied with the rest
    copies: tuple[tuple[int, int, int], ...]  #: (offset in the source, offset here, bytes)
    changed: dict[str, Place]


def lay_out(like: CheckpointIndex, changed: Mapping[str, torch.dtype]) -> list[ShardLayout]:
    """The shards, in the order of the index; of each its changed tensors in the order of their bytes.

    Raises:
        CheckpointError: a changed tensor that ``like`` lacks, a dtype that the format lacks, a file that cannot be
            read.
    """
    for name in changed:
        if name not in like.tensors:
            raise CheckpointError(f"{like.path}: has no tensor {name!r} to change")
    shards = by_shard(like)
    if not shards:  # a file without tensors is a checkpoint too
        shards[like.path if like.path.is_file() else like.path / SINGLE_FILE] = []
    return [_lay_out(_name(like, path), path, entries, changed) for path, entries in shards.items()]


def _name(like: CheckpointIndex, shard: Path) -> str:
    return SINGLE_FILE if like.path.is_file() else str(shard.relative_to(like.path))


def _lay_out(
    name: str, source: Path, entries: list[TensorEntry], changed: Mapping[str, torch.dtype]
) -> ShardLayout:
    size = source.stat().st_size
    data_start = min((entry.start for entry in entries), default=size)
    dtypes = {e.name: stored_name(changed[e.name]) if e.name in changed else e.dtype for e in entries}
    header = None
    copies = []
    at = data_start
    # Tensors that share their bytes in the source get bytes of their own.
    shared = any(a.end > b.start for a, b in pairwise(entries))
    if shared or any(dtypes[entry.name] != entry.dtype for entry in entries):
        header = _header(source, entries, dtypes)
        at = len(header)
    else:
        copies.append((0, 0, data_start))
    places: dict[str, Place] = {}
    for entry in entries:
        if entry.name in changed:
            places[entry.name] = Place(at, entry.shape, changed[entry.name])
            at += places[entry.name].bytes
        else:
            copies.append((entry.start, at, entry.end - entry.start))
            at += entry.end - entry.start
    return ShardLayout(name, source, at, header, tuple(_joined(copies)), places)


def _joined(copies: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same copies, neighbours made one."""
    out: list[tuple[int, int, int]] = []
    for there, here, count in copies:
        if out and out[-1][0] + out[-1][2] == there and out[-1][1] + out[-1][2] == here:
            out[-1] = (out[-1][0], out[-1][1], out[-1][2] + count)
        elif count:
            out.append((there, here, count))
    return out


def _header(source: Path, entries: list[TensorEntry], dtypes: Mapping[str, str]) -> bytes:
    """The length and the JSON of a shard whose tensors keep their order and change their dtypes."""
    try:
        _, metadata = _C.read_header(os.fsencode(source))
    except _C.FileError as error:
        raise CheckpointError(f"{source}: {error}") from None
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for entry in entries:
        size = entry.end - entry.start
        if dtypes[entry.name] != entry.dtype:
            size = prod(entry.shape) * TORCH_DTYPES[dtypes[entry.name]].itemsize
        content[entry.name] = {
            "dtype": dtypes[entry.name],
            "shape": entry.shape,
            "data_offsets": [at, at + size],
        }
        at += size
    return header_bytes(content)


def header_bytes(content: Mapping[str, Any]) -> bytes:
    """The length and the JSON with which a file starts, from ``dtype``, ``shape`` and ``data_offsets`` by name."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's own writer aligns the tensors so
    return struct.pack("<Q", len(text)) + text


def index_content(like: CheckpointIndex, shards: list[ShardLayout]) -> bytes | None:
    """What the new index file holds; None where the checkpoint goes by none.

    An index beside ``model.safetensors``, which goes before it, lists other shards or the same file: left behind.
    """
    path = like.path / INDEX_FILE
    if like.path.is_file() or (like.path / SINGLE_FILE).is_file() or not path.is_file():
        return None
    content = path.read_bytes()
    parsed = json.loads(content)
    listed = parsed["weight_map"]
    absent = listed.keys() - like.tensors.keys()  # a tied head that no shard holds
    if all(shard.header is None for shard in shards) and not absent:
        return content
    metadata = parsed.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(_tensor_bytes(like, shards).values())
    names = {shard.source: shard.name for shard in shards}
    added = {
        name: entry
        for name, entry in like.tensors.items()
        if name not in listed or entry.shard != like.path / listed[name]
    }
    parsed["weight_map"] = {name: file for name, file in listed.items() if name not in absent}
    parsed["weight_map"] |= {name: names[entry.shard] for name, entry in added.items()}
    if isinstance(metadata, dict) and isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(prod(entry.shape) for entry in added.values())
    return (json.dumps(parsed, indent=2, ensure_ascii=False) + "\n").encode()


def _tensor_bytes(like: CheckpointIndex, shards: list[ShardLayout]) -> dict[str, int]:
    sizes = {name: entry.end - entry.start for name, entry in like.tensors.items()}
    return sizes | {name: place.bytes for shard in shards for name, place in shard.changed.items()}
