"""Tensors of a checkpoint one after the other, read ahead by worker threads within a stated bound of memory.

Files, threads and memory are the business of `rlspec._C` (``csrc/reader.hpp``, ``csrc/pool.hpp``).
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from rlspec import _C
from rlspec.errors import CheckpointError
from rlspec.io.device import CopyQueue, copies_to, pinning
from rlspec.io.dtypes import torch_dtype
from rlspec.io.index import CheckpointIndex, TensorEntry

Io = Literal["auto", "direct", "buffered"]

# Row blocks per bound: one in use, one asked for, two being read.
_BLOCKS = 4


class MemoryBoundError(CheckpointError, ValueError):
    """A tensor does not fit the memory that reading may use, or those still held leave it no room."""


@dataclass(frozen=True)
class Streamed:
    """A tensor and where it comes from."""

    entry: TensorEntry
    tensor: Tensor
    """shape and dtype of ``entry``; writable. On the CPU 64-byte aligned, and its memory goes back to the reader when
    the last tensor that shares it is gone; on another device a tensor of its own."""


class TensorStream:
    """Iterate over tensors of a checkpoint in the order asked for; a context manager.

    On the CPU tensors are not copied: each is a view of the buffer that it was read into. So drop a tensor before asking
    for the next one where the bound is narrow, and clone what is to stay.

    Args:
        index: the checkpoint.
        names: which tensors, in which order; None: all, shard by shard, by byte offset.
        memory_bytes: bound on all buffers together: tensors being read, read ahead, and handed out but still
            referred to. A tensor takes its own bytes and at most 12 KiB.
        workers: threads that read. Each may need 1 MiB besides, where the device wants its reads aligned.
        io: ``auto`` takes what the page cache has from there and reads the rest past it (O_DIRECT) where the file
            system can (not of files that are neither this user's nor writable: the system does not tell what it has
            of those); ``direct`` always reads past the cache where it can; ``buffered`` never does.
        device: where the tensors go. To a CUDA device they are copied from pinned buffers while the next are read; the
            bound is on the buffers, up to two of which are being copied from, and one tensor more than was asked for is
            on the device.

    Raises:
        CheckpointError: a name that the checkpoint lacks; a file that cannot be read or became shorter.
        MemoryBoundError: a tensor larger than the bound; in iteration: tensors still held leave no room for the next.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        names: Sequence[str] | None = None,
        *,
        memory_bytes: int = 1 << 30,
        workers: int = 4,
        io: Io = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        entries = in_file_order(index) if names is None else [_entry(index, n) for n in names]
        self._start(entries, memory_bytes, workers, io, torch.device(device))

    @classmethod
    def of_entries(
        cls,
        entries: Sequence[TensorEntry],
        *,
        memory_bytes: int,
        workers: int = 4,
        io: Io = "auto",
        device: torch.device | str = "cpu",
    ) -> TensorStream:
        """A stream of tensors that may belong to several checkpoints; arguments and errors as above."""
        stream = cls.__new__(cls)
        stream._start(list(entries), memory_bytes, workers, io, torch.device(device))
        return stream

    def _start(
        self, entries: list[TensorEntry], memory_bytes: int, workers: int, io: Io, device: torch.device
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers {workers} must be at least 1")
        for entry in entries:
            torch_dtype(entry)
            _check_fits([entry], memory_bytes)
        self._entries = entries
        self._position = 0
        self._one_at_a_time = threading.Lock()  # several threads may share the tensors of one stream
        files = {shard: number for number, shard in enumerate(dict.fromkeys(e.shard for e in entries))}
        copies = copies_to(device)
        self._queue: CopyQueue[TensorEntry] | None = None if copies is None else CopyQueue(copies)
        #: what is in use, and the most that ever was
        self.pool = _C.Pool(memory_bytes, *pinning(device))
        self._reader: _C.Reader | None = _C.Reader(
            [os.fsencode(shard) for shard in files],
            [(files[entry.shard], entry.start, entry.end) for entry in entries],
            self.pool,
            workers,
            io,
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> TensorStream:
        return self

    def __next__(self) -> Streamed:
        with self._one_at_a_time:
            return self._next()

    def _next(self) -> Streamed:
        try:
            found = self._read() if self._queue is None else self._queue.next(self._read_ahead)
        except MemoryBoundError:
            raise  # the caller may make room and ask again
        except BaseException:  # a GPU without room, too: the tensor that was to go there is read and gone
            self.close()
            raise
        if found is None:
            self.close()
            raise StopIteration
        return Streamed(*found)

    def _read(self) -> tuple[TensorEntry, Tensor] | None:
        """The next tensor on the CPU; None after the last."""
        if self._reader is None or self._position == len(self._entries):
            return None
        entry = self._entries[self._position]
        try:
            block = self._next_block(self._reader)
        except _C.FileError as error:
            raise self._explained(entry, error) from None
        self._position += 1
        return entry, _as_tensor(block, entry)

    def _read_ahead(self) -> tuple[TensorEntry, Tensor] | None:
        """The same; None also where the copies under way leave no room for it."""
        try:
            return self._read()
        except MemoryBoundError:
            if not self._queue:
                raise
            return None

    def _next_block(self, reader: _C.Reader) -> _C.Block:
        try:
            return reader.next()
        except _C.FileError as error:
            if error.kind != "buffers_held" or self._queue:
                raise
        gc.collect()  # tensors in reference cycles are not held by anybody
        return reader.next()

    def _explained(self, entry: TensorEntry, error: _C.FileError) -> CheckpointError:
        if error.kind != "buffers_held":
            return CheckpointError(f"{entry.shard}: reading {entry.name!r}: {error}")
        return MemoryBoundError(
            f"{entry.shard}: no room for {entry.name!r} ({entry.end - entry.start} bytes): tensors handed out before "
            f"still hold {self.pool.in_use} of {self.pool.bound} bytes; drop them before asking for the next, or "
            "allow more memory"
        )

    def close(self) -> None:
        """Stop reading; tensors that were handed out stay valid. May be called twice."""
        try:
            if self._queue is not None:
                self._queue.close()
        finally:
            self._reader = None

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stream_pairs(
    base: CheckpointIndex,
    tuned: CheckpointIndex,
    names: Sequence[str],
    *,
    memory_bytes: int = 1 << 30,
    workers: int = 4,
    io: Io = "auto",
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Tensors of two checkpoints in step, matched by name, however each is sharded.

    Args:
        base, tuned: the checkpoints.
        names: which tensors, in which order.
        memory_bytes, workers, io, device: as of `TensorStream`; the bound is on both checkpoints' tensors together.

    Yields:
        Name, the base's tensor, the tuned tensor; as `Streamed.tensor`.

    Raises:
        CheckpointError, MemoryBoundError: as `TensorStream`; a pair must fit the bound.
    """
    entries = []
    for name in names:
        pair = [_entry(base, name), _entry(tuned, name)]
        _check_fits(pair, memory_bytes)
        entries += pair
    stream = TensorStream.of_entries(
        entries, memory_bytes=memory_bytes, workers=workers, io=io, device=device
    )
    return _pairs(stream)


def _pairs(stream: TensorStream) -> Iterator[tuple[str, Tensor, Tensor]]:
    # No name here may keep a pair alive while the next one is asked for.
    with stream:
        while (pair := _next_pair(stream)) is not None:
            yield (pair.pop(), pair.pop(), pair.pop())  # type: ignore[misc]


def _next_pair(stream: TensorStream) -> list[Tensor | str] | None:
    base = next(stream, None)
    if base is None:
        return None
    return [next(stream).tensor, base.tensor, base.entry.name]


def stream_rows(
    index: CheckpointIndex, name: str, *, memory_bytes: int, workers: int = 4, io: Io = "auto"
) -> Iterator[tuple[int, Tensor]]:
    """A tensor in blocks of rows, for one larger than the bound. A row is what one index of the first axis gives.

    Args:
        memory_bytes: bound on all blocks together, see `TensorStream`; a block takes about a quarter.

    Yields:
        Index of the first row, and the rows (b, ...); of a scalar, 0 and the scalar. Nothing where there is no row.

    Raises:
        CheckpointError: the checkpoint lacks it, or the file cannot be read.
        MemoryBoundError: a row is too large.
    """
    return stream_blocks(row_blocks(_entry(index, name), memory_bytes), memory_bytes, workers=workers, io=io)


def row_blocks(entry: TensorEntry, memory_bytes: int) -> list[tuple[int, TensorEntry]]:
    """A tensor's rows in blocks of which four fit the bound: the index of the first row of each, and the block.

    Raises:
        MemoryBoundError: a row is too large.
    """
    torch_dtype(entry)
    rows = entry.shape[0] if entry.shape else 1
    row_bytes = (entry.end - entry.start) // max(rows, 1)
    overhead = _C.pool_bytes(4095, 4097)
    if 2 * (row_bytes + overhead) > memory_bytes:
        raise MemoryBoundError(
            f"{entry.shard}: a row of {entry.name!r} has {row_bytes} bytes, the bound is {memory_bytes}; two rows must "
            "fit, allow more memory"
        )
    count = max(1, (memory_bytes // _BLOCKS - overhead) // row_bytes) if row_bytes else max(rows, 1)
    blocks = []
    for first in range(0, rows, count):
        last = min(first + count, rows)
        start = entry.start + first * row_bytes
        shape = (last - first, *entry.shape[1:]) if entry.shape else ()
        blocks.append(
            (first, replace(entry, shape=shape, start=start, end=start + (last - first) * row_bytes))
        )
    return blocks


def stream_blocks(
    blocks: Sequence[tuple[int, TensorEntry]], memory_bytes: int, *, workers: int = 4, io: Io = "auto"
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows, each with the index of its first one, as :func:`row_blocks` cuts them; errors as `TensorStream`."""
    entries = [entry for _, entry in blocks]
    stream = TensorStream.of_entries(entries, memory_bytes=memory_bytes, workers=workers, io=io)
    return _rows(stream, [first for first, _ in blocks])


def aligned(
    base: Iterable[tuple[int, Tensor]], tuned: Iterable[tuple[int, Tensor]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The index of the first row, and row blocks of two streams of one tensor, which may cut it at different rows."""
    there, here = iter(base), iter(tuned)
    first = 0
    left: Tensor | None = None
    right: Tensor | None = None
    while True:
        if left is None or not len(left):
            left = next((block for _, block in there), None)
        if right is None or not len(right):
            right = next((block for _, block in here), None)
        if left is None or right is None:
            return
        count = min(len(left), len(right))
        yield first, left[:count], right[:count]
        left, right, first = left[count:], right[count:], first + count


def _rows(stream: TensorStream, firsts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    with stream:
        for first in firsts:
            yield first, next(stream).tensor


def read_tensor(index: CheckpointIndex, name: str) -> Tensor:
    """One tensor, in memory that belongs to it alone.

    Raises:
        CheckpointError: the checkpoint lacks it, or the file cannot be read.
    """
    entry = _entry(index, name)
    needed = _C.pool_bytes(entry.start, entry.end)
    with TensorStream.of_entries([entry], memory_bytes=max(needed, 1)) as stream:
        return next(stream).tensor


def in_file_order(index: CheckpointIndex) -> list[TensorEntry]:
    """All tensors, as :func:`by_shard` orders them."""
    return list(chain(*by_shard(index).values()))


def by_shard(index: CheckpointIndex) -> dict[Path, list[TensorEntry]]:
    """All tensors: shards in the order in which the index names them, each shard's by byte offset."""
    shards: dict[Path, list[TensorEntry]] = {}
    for entry in index.tensors.values():
        shards.setdefault(entry.shard, []).append(entry)
    return {path: sorted(shard, key=lambda e: (e.start, e.end, e.name)) for path, shard in shards.items()}


def _entry(index: CheckpointIndex, name: str) -> TensorEntry:
    if name not in index.tensors:
        raise CheckpointError(f"{index.path}: has no tensor {name!r}")
    return index.tensors[name]


def _check_fits(entries: Sequence[TensorEntry], memory_bytes: int) -> None:
    needed = sum(_C.pool_bytes(entry.start, entry.end) for entry in entries)
    if needed > memory_bytes:
        what = " and its twin" if len(entries) > 1 else ""
        raise MemoryBoundError(
            f"{entries[0].shard}: {entries[0].name!r} {list(entries[0].shape)}{what} takes {needed} bytes, the bound "
            f"is {memory_bytes}; allow more memory or read it in row blocks (stream_rows)"
        )


def _as_tensor(block: _C.Block, entry: TensorEntry) -> Tensor:
    dtype = torch_dtype(entry)
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(block, dtype=dtype, count=prod(entry.shape)).view(entry.shape)
