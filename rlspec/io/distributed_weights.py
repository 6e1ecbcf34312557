"""Weights of a checkpoint of torch.distributed.checkpoint: parts are read ahead, each tensor is made of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from rlspec.errors import CheckpointError, TensorError
from rlspec.io.distributed import DistributedIndex, DistributedTensor, Part
from rlspec.io.dtypes import stored_name
from rlspec.io.fused import Config
from rlspec.io.index import TensorEntry
from rlspec.io.projections import Projection, read_config
from rlspec.io.saved import SavedTensor, find_saved
from rlspec.io.stream import TensorStream, row_blocks, stream_blocks
from rlspec.io.weights import Weights, read_ahead_bytes


@dataclass(frozen=True)
class _Placed:
    """A part, and where its values lie."""

    part: Part
    saved: SavedTensor
    entry: TensorEntry  #: the storage

    @property
    def is_contiguous(self) -> bool:
        """Whether its values lie row by row."""
        sizes = (*self.saved.shape[1:], 1)
        return self.saved.strides == tuple(prod(sizes[axis:]) for axis in range(len(self.saved.shape)))


class DistributedWeights(Weights):
    """The weights of one model, ``.metadata`` read once.

    Args:
        folder: the one with ``.metadata``.

    Raises:
        CheckpointError: see `DistributedIndex.open`; in iteration: an archive in a file is malformed, or its tensor has
            another shape or dtype than ``.metadata`` says.
    """

    _copies_parts = True

    def __init__(self, folder: Path) -> None:
        self._index = DistributedIndex.open(folder)
        self.where = f"the checkpoint {folder}"

    @property
    def folder(self) -> Path:
        """The one with ``.metadata``."""
        return self._index.path

    @property
    def tensors(self) -> Mapping[str, DistributedTensor]:
        """Every tensor of the model by its name, and where its parts lie."""
        return self._index.tensors

    def has_rows(self, name: str) -> bool:
        """Whether each part of a tensor is some of its rows."""
        tensor = self._index.tensors[name]
        return bool(tensor.shape) and all(
            not any(part.offsets[1:]) and part.shape[1:] == tensor.shape[1:] for part in tensor.parts
        )

    def rows(self, name: str, *, memory_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """A tensor in blocks of rows, as ``stream_rows`` gives them; whole where its parts are no rows of it, or none.

        Args:
            memory_bytes: bound on what is read and held; the whole that is made of parts that are no rows comes on top.

        Raises:
            CheckpointError: as in iteration of other weights. MemoryBoundError: a row, or such a part, is too large.
        """
        tensor = self._index.tensors[name]
        placed = [_placed(name, tensor, part) for part in sorted(tensor.parts, key=lambda part: part.offsets)]
        if placed and self.has_rows(name) and all(one.is_contiguous for one in placed):
            blocks = []
            for one in placed:
                entry = replace(one.entry, shape=one.part.shape)
                first = one.part.offsets[0]
                blocks += [(first + at, block) for at, block in row_blocks(entry, memory_bytes)]
            yield from stream_blocks(blocks, memory_bytes)
            return
        with TensorStream.of_entries([one.entry for one in placed], memory_bytes=memory_bytes) as stream:
            yield 0, _assembled(tensor, placed, stream)

    def pairs(
        self, others: Sequence[TensorEntry], names: Sequence[str], memory_bytes: int
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Tensors of another checkpoint beside these, in the order given: the name there, that one, this one."""
        placed = [
            [_placed(name, self._index.tensors[name], part) for part in self._index.tensors[name].parts]
            for name in names
        ]
        entries = []
        for other, parts in zip(others, placed, strict=True):
            entries += [other, *(one.entry for one in parts)]
        with TensorStream.of_entries(entries, memory_bytes=memory_bytes) as stream:
            for other, name, parts in zip(others, names, placed):
                there = next(stream).tensor
                here = _assembled(self._index.tensors[name], parts, stream)
                yield other.name, there, here
                del there, here  # before the next ones are asked for

    def config(self) -> Config | None:
        """That of the folder, or of the one above it, where trainers put it."""
        here = read_config(self._index.path)
        return read_config(self._index.path.parent) if here is None else here

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._index.tensors.items()}

    def in_file_order(self, projections: Iterable[Projection]) -> list[Projection]:
        firsts = {name: tensor.parts[0] for name, tensor in self._index.tensors.items() if tensor.parts}
        places = {name: (str(part.file), part.start) for name, part in firsts.items()}
        return sorted(projections, key=lambda projection: places.get(projection.tensor, ("", -1)))

    @contextmanager
    def _file_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except TensorError as error:
            raise TensorError(f"{self._index.path}: {error}") from None

    def _names(self) -> Collection[str]:
        return self._index.tensors.keys()

    def _load(self, name: str) -> Tensor:
        (tensor,) = self._tensors_of([name])
        return tensor

    def _tensors_of(self, names: Sequence[str]) -> Iterator[Tensor]:
        tensors = [self._index.tensors[name] for name in names]
        placed = [
            [_placed(name, t, part) for part in t.parts] for name, t in zip(names, tensors, strict=True)
        ]
        entries = [one.entry for parts in placed for one in parts]
        with TensorStream.of_entries(entries, memory_bytes=read_ahead_bytes(entries)) as stream:
            for tensor, parts in zip(tensors, placed, strict=True):
                yield _assembled(tensor, parts, stream)


def _placed(name: str, tensor: DistributedTensor, part: Part) -> _Placed:
    saved = find_saved(part.file, part.start, part.length)
    if (saved.dtype, saved.shape) != (tensor.dtype, part.shape):
        raise CheckpointError(
            f"{part.file}: {name!r}, its part at {list(part.offsets)}: {saved.dtype} {list(saved.shape)} in the file, "
            f"{tensor.dtype} {list(part.shape)} wanted"
        )
    count = (saved.end - saved.start) // saved.dtype.itemsize
    entry = TensorEntry(name, part.file, stored_name(saved.dtype), (count,), saved.start, saved.end)
    return _Placed(part, saved, entry)


def _assembled(tensor: DistributedTensor, parts: Sequence[_Placed], stream: TensorStream) -> Tensor:
    """A tensor of the next parts of a stream; what is one part is not copied."""
    if len(parts) == 1:
        return _next(stream, parts[0])
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    for placed in parts:  # no name keeps one while the next is asked for
        ranges = zip(placed.part.offsets, placed.part.shape, strict=True)
        whole[tuple(slice(first, first + size) for first, size in ranges)] = _next(stream, placed)
    return whole


def _next(stream: TensorStream, placed: _Placed) -> Tensor:
    return next(stream).tensor.as_strided(placed.saved.shape, placed.saved.strides)
