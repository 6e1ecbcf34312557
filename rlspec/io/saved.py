"""Where the values of a tensor that `torch.save` wrote lie in a file, so that they are read like those of safetensors.

Such an archive is a zip file whose members are stored as they are: ``data.pkl``, a pickle with dtype, shape and strides,
and ``data/0``, the bytes of the storage. It may lie anywhere in a larger file.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from rlspec.errors import CheckpointError
from rlspec.io.files import read_error
from rlspec.io.pickled import PERSISTENT, Made, Named, read_pickle

# The table of contents and the pickle of one tensor have a few hundred bytes.
_MOST = 1 << 20
_LOCAL_HEADER, _LOCAL_MAGIC = 30, b"PK\x03\x04"
_MOST_AXES = 64
_STORAGES = {
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_UNTYPED = "torch.storage.UntypedStorage"
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_NAMES = {*_STORAGES, *_REBUILD, _UNTYPED, "collections.OrderedDict"}


@dataclass(frozen=True)
class SavedTensor:
    """A tensor whose storage holds its elements and no others."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  #: in elements
    start: int  #: first byte of the storage in the file
    end: int  #: one past the last byte


def dtype_named(name: str) -> torch.dtype | None:
    """The dtype that pickles name as ``torch.bfloat16``; None where torch has none of that name."""
    module, _, word = name.partition(".")
    found = (
        vars(torch).get(word) if module == "torch" else None
    )  # getattr imports some of what torch is asked for
    return found if isinstance(found, torch.dtype) else None


def find_saved(path: Path, start: int, length: int) -> SavedTensor:
    """The tensor whose archive takes ``length`` bytes of a file from ``start`` on. Its values are not read.

    Raises:
        CheckpointError: no archive of one plain dense tensor is there, or the file cannot be read.
    """
    where = f"{path}: bytes {start} to {start + length}"
    try:
        with path.open("rb") as file:
            archive = _Archive(_Window(file, start, length), where)
            return _saved(archive, where, start)
    except OSError as error:
        raise read_error(path, error) from None


def _saved(archive: _Archive, where: str, start: int) -> SavedTensor:
    wanted = "what torch.save writes of a tensor"
    order = archive.read("byteorder") or b"little"
    if order != sys.byteorder.encode():
        raise CheckpointError(f"{where}: byte order {order[:20]!r}, this machine's is {sys.byteorder}")
    pickle = archive.read("data.pkl")
    if pickle is None:
        raise CheckpointError(f"{where}: an archive without data.pkl, which is not {wanted}")
    described = read_pickle(
        pickle, allowed=lambda n: n in _NAMES or dtype_named(n) is not None, where=where, what=wanted
    )
    try:
        dtype, key, shape, strides = _tensor(described)
    except (TypeError, ValueError, KeyError):
        raise CheckpointError(f"{where}: holds no plain tensor, which is not {wanted}") from None
    first, last = archive.span(f"data/{key}")
    if last - first != prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{where}: {last - first} bytes for {dtype} {shape}, {prod(shape) * dtype.itemsize} wanted"
        )
    return SavedTensor(dtype, shape, strides, start + first, start + last)


def _tensor(described: Any) -> tuple[torch.dtype, str, tuple[int, ...], tuple[int, ...]]:
    """dtype, name of the storage, shape and strides of a pickled tensor; what Python raises where it is none."""
    if not isinstance(described, Made) or described.kind not in _REBUILD:
        raise TypeError
    storage, offset, shape, strides, _grad, _hooks, *more = described.arguments
    if not isinstance(storage, Made) or storage.kind != PERSISTENT or offset != 0:
        raise TypeError
    kind, storage_class, key, _device, _count = storage.arguments[0]
    if kind != "storage" or not isinstance(key, str) or not isinstance(storage_class, Named):
        raise TypeError
    dtype: torch.dtype | None
    if described.kind == _REBUILD[0]:
        dtype = _STORAGES[storage_class.name]
    else:
        dtype = dtype_named(more[0].name) if more and isinstance(more[0], Named) else None
    if dtype is None:
        raise TypeError
    sizes, steps = whole_numbers(shape), whole_numbers(strides)
    if len(sizes) != len(steps) or not _is_dense(sizes, steps):
        raise ValueError
    return dtype, key, sizes, steps


def whole_numbers(value: Any) -> tuple[int, ...]:
    """A tuple of integers that the axes of a tensor may have as their length.

    Raises:
        TypeError: it is none.
    """
    if (
        not isinstance(value, tuple)
        or len(value) > _MOST_AXES
        or any(type(n) is not int or not 0 <= n < 1 << 63 for n in value)
    ):
        raise TypeError
    return value


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill as many places as there are, in any order of the axes."""
    if prod(shape) == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


class _Window(io.RawIOBase):
    """Some bytes of a file as a file, of which nobody reads much at once."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self.length = file, start, length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        place = offset + (0, self._at, self.length)[whence]
        if not 0 <= place <= self.length:
            raise ValueError
        self._at = place
        return place

    def read(self, size: int = -1) -> bytes:
        left = self.length - self._at
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > _MOST:
            raise ValueError
        self._file.seek(self._start + self._at)
        taken = self._file.read(wanted)
        if len(taken) < wanted:
            raise EOFError
        self._at += wanted
        return taken


class _Archive:
    """The members of a zip file, none of them compressed; sums are not checked, as torch may write none."""

    def __init__(self, window: _Window, where: str) -> None:
        self._window, self._where = window, where
        try:
            members = zipfile.ZipFile(window).infolist()
        except (zipfile.BadZipFile, ValueError, EOFError, OverflowError, NotImplementedError, struct.error):
            raise CheckpointError(f"{where}: no archive of torch.save, or one that is cut off") from None
        self._members = {member.filename.partition("/")[2]: member for member in members}

    def span(self, name: str) -> tuple[int, int]:
        """First byte of a member and one past its last."""
        member = self._members.get(name)
        if member is None:
            raise CheckpointError(f"{self._where}: an archive of torch.save without {name!r}")
        try:
            self._window.seek(member.header_offset)
            header = self._window.read(_LOCAL_HEADER)
            name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
            first = member.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
            inside = header[:4] == _LOCAL_MAGIC and first + member.file_size <= self._window.length
            if member.compress_type != zipfile.ZIP_STORED or not inside:
                raise ValueError
        except (ValueError, EOFError, struct.error):
            raise CheckpointError(
                f"{self._where}: {name!r} is compressed or lies outside its archive"
            ) from None
        return first, first + member.file_size

    def read(self, name: str) -> bytes | None:
        """A small member; None where there is none of that name."""
        if name not in self._members:
            return None
        first, last = self.span(name)
        try:
            self._window.seek(first)
            return self._window.read(last - first)
        except (ValueError, EOFError):
            raise CheckpointError(f"{self._where}: {name!r} is larger than such a file's") from None
