"""A basis in a folder: decomposed once, measured against on other machines.

::

    basis.json                          what is in it; its place tells that the folder is a basis
    basis-00001-of-00003.safetensors    of each matrix the weight and its factors: NAME/W, NAME/U, NAME/S, NAME/Vh

The folder appears whole or not at all. Shards are mapped into memory when they are read, and what is kept are copies that
lie as those of a basis that was just decomposed: how BLAS sums depends on layout and alignment, see rlspec.spectra.cache.
The folder may come from anyone: what it says is checked against the tensors, the tensors against their checksums.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlspec import _C
from rlspec.errors import CheckpointError, OptionError, RlspecError
from rlspec.io.dtypes import TORCH_DTYPES, stored_name
from rlspec.io.files import read_json_object
from rlspec.io.index import BASIS_FILE
from rlspec.io.layout import header_bytes
from rlspec.io.projections import MODULES, Projection, check_finite
from rlspec.io.staging import Staging, write_file
from rlspec.io.weights import Weights, open_weights
from rlspec.linalg.rank import Rank
from rlspec.perturb.matrix import MatrixBasis, matrix_basis
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.cache import bytes_of, checksum, fresh

_FORMAT, _VERSION = "rlspec basis", 1
#: A shard is closed before it grows beyond this, unless a single matrix does.
SHARD_BYTES = 4 << 30
_SHARD = re.compile(r"basis-\d{5}-of-\d{5}\.safetensors")
_PARTS = ("W", "U", "S", "Vh")
_LOST = "save or fetch it anew"


@dataclass(frozen=True)
class _Entry:
    """What basis.json says of one matrix."""

    projection: Projection
    shape: tuple[int, int]
    dtype: torch.dtype
    factors: torch.dtype
    shard: str
    checksum: str


def save_basis(
    folder: Path,
    projections: Sequence[Projection],
    matrices: Sequence[MatrixBasis],
    rank: Rank,
    note: str | None,
) -> None:
    """Write a basis, a matrix at a time.

    Args:
        folder: which appears when all is written.
        projections, matrices: of the same names in the same order.

    Raises:
        CheckpointError: the folder exists already or cannot be written, or safetensors lacks a dtype.
    """
    if os.path.lexists(folder):
        raise CheckpointError(
            f"{folder}: exists already, and a basis is not written over anything; choose another name"
        )
    staging = Staging(folder, "", resume=False, overwrite=False)
    try:
        shards = _shards(matrices)
        entries: list[dict[str, Any]] = []
        by_name = {projection.name: projection for projection in projections}
        for number, members in enumerate(shards, start=1):
            name = f"basis-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(staging.checkpoint / name, members)
            entries += [_described(by_name[matrix.name], matrix, name) for matrix in members]
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "rlspec": version("rlspec"),
            "modules": [module for module in MODULES if any(p.module == module for p in projections)],
            "per_head": any(p.head is not None for p in projections),
            "rank": str(rank),
            "note": note,
            "matrices": entries,
        }
        write_file(staging.checkpoint / BASIS_FILE, json.dumps(content, indent=1).encode())
        staging.publish()
    finally:
        staging.close(keep=False)


class SavedBasis:
    """A basis in a folder, of which basis.json alone is read until matrices are asked for.

    Attributes:
        folder: where it is.
        projections, rank, note: see ``SpectralBasis``.

    Raises:
        CheckpointError: there is no basis, one of a later version, or a basis.json that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / BASIS_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: no {BASIS_FILE} in it, so no saved basis; SpectralBasis.from_checkpoint decomposes a "
                "checkpoint"
            )
        content = read_json_object(file)
        if content.get("format") != _FORMAT:
            raise CheckpointError(
                f"{file}: not of a basis that rlspec saved: format is {content.get('format')!r}"
            )
        if content.get("version") != _VERSION:
            raise CheckpointError(
                f"{file}: a basis of version {content.get('version')!r}, and this rlspec reads version {_VERSION}; "
                f"rlspec {content.get('rlspec')} wrote it"
            )
        self.folder = folder
        self.rank, self.note, entries = _read(file, content)
        self._entries = {entry.projection.name: entry for entry in entries}
        self.projections = tuple(entry.projection for entry in entries)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of each matrix, by the name of its projection."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def part(
        self,
        projections: Sequence[Projection],
        *,
        device: torch.device,
        rank: Rank | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SpectralBasis:
        """Read some of its matrices.

        Args:
            projections: some of its own.
            device: where to measure them.
            rank: in the place of the saved one.
            progress: called with (done, total) after every matrix.

        Raises:
            CheckpointError: files are missing, damaged or no basis's.
            TensorError: a matrix or a factor holds NaN or infinity.
        """
        rule = self.rank if rank is None else rank
        entries = [self._entries[projection.name] for projection in projections]
        matrices: list[MatrixBasis] = []
        for shard, members in groupby(entries, key=lambda entry: entry.shard):
            for matrix in _read_shard(self.folder / shard, list(members), rule):
                matrices.append(matrix)
                if progress is not None:
                    progress(len(matrices), len(entries))
        devices = {projection.name: device for projection in projections}
        return SpectralBasis(projections, matrices, rule, self.note, devices=devices)


def opened_base(base: str | Path | SpectralBasis) -> Weights | SpectralBasis | SavedBasis:
    """A reference as what it is: a basis, one that is saved, or the weights of a checkpoint.

    Raises:
        CheckpointError: a folder of neither.
    """
    if isinstance(base, SpectralBasis):
        return base
    folder = Path(base)
    return SavedBasis(folder) if (folder / BASIS_FILE).is_file() else open_weights(folder)


def _shards(matrices: Sequence[MatrixBasis]) -> list[list[MatrixBasis]]:
    """The matrices in order, in groups of bounded size."""
    groups: list[list[MatrixBasis]] = []
    room = 0
    for matrix in matrices:
        size = sum(tensor.nbytes for tensor in _tensors(matrix))
        if not groups or size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(matrix)
        room -= size
    return groups


def _tensors(matrix: MatrixBasis) -> tuple[Tensor, ...]:
    return matrix.W, matrix.U, matrix.S, matrix.Vh


def _write_shard(path: Path, matrices: Sequence[MatrixBasis]) -> None:
    """One safetensors file, each tensor written from where it lies."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for matrix in matrices:
        for part, tensor in zip(_PARTS, _tensors(matrix), strict=True):
            content[f"{matrix.name}/{part}"] = {
                "dtype": stored_name(tensor.dtype),
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
    header = header_bytes(content)
    try:
        file = _C.OutputFile(os.fsencode(path))
        file.reserve(len(header) + at)
        file.write(0, header)
        at = len(header)
        for matrix in matrices:
            for tensor in _tensors(matrix):
                file.write(at, bytes_of(tensor))
                at += tensor.nbytes
        file.finish()
    except _C.FileError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _described(projection: Projection, matrix: MatrixBasis, shard: str) -> dict[str, Any]:
    rows, columns = projection.rows, projection.columns
    return {
        "name": projection.name,
        "tensor": projection.tensor,
        "module": projection.module,
        "layer": projection.layer,
        "head": projection.head,
        "rows": None
        if rows is None
        else [[s.start, s.stop] for s in ((rows,) if isinstance(rows, slice) else rows)],
        "columns": None if columns is None else [columns.start, columns.stop],
        "transposed": projection.transposed,
        "shape": list(matrix.shape),
        "dtype": stored_name(matrix.W.dtype),
        "factors": stored_name(matrix.U.dtype),
        "file": shard,
        "checksum": checksum(_tensors(matrix)),
    }


def _read(file: Path, content: Mapping[str, Any]) -> tuple[Rank, str | None, list[_Entry]]:
    """What basis.json says, refused where it cannot be."""
    place = "rank"
    try:
        rule = Rank.parse(_typed(content["rank"], str))
        place = "note"
        note = content["note"] if content["note"] is None else _typed(content["note"], str)
        entries = []
        for number, given in enumerate(_typed(content["matrices"], list), start=1):
            place = f"matrix {number}"
            entries.append(_entry(_typed(given, dict)))
        place = "matrices"
        if not entries or len({entry.projection.name for entry in entries}) < len(entries):
            raise ValueError("none, or two of one name")
    except KeyError as error:
        raise CheckpointError(f"{file}: {place}: {error} is missing; {_LOST}") from None
    except (ValueError, OptionError) as error:
        raise CheckpointError(f"{file}: {place}: {error}; {_LOST}") from None
    return rule, note, entries


def _entry(given: Mapping[str, Any]) -> _Entry:
    """
    Raises:
        KeyError, ValueError: it lacks something, or something is not what is saved there.
    """
    shape = _span(given["shape"], least=1)
    rows = None
    if given["rows"] is not None:
        parts = tuple(slice(*_range(part)) for part in _typed(given["rows"], list))
        if sum(part.stop - part.start for part in parts) != shape[0]:
            raise ValueError(f"rows {given['rows']!r} are not the {shape[0]} of the shape")
        rows = parts[0] if len(parts) == 1 else parts
    columns = None if given["columns"] is None else slice(*_range(given["columns"]))
    if columns is not None and columns.stop - columns.start != shape[1]:
        raise ValueError(f"columns {given['columns']!r} are not the {shape[1]} of the shape")
    factors = _dtype(given["factors"])
    if factors not in (torch.float32, torch.float64):
        raise ValueError(f"factors are {given['factors']}; wanted F32 or F64")
    if given["module"] not in MODULES:
        raise ValueError(f"module is {given['module']!r}; valid: {', '.join(MODULES)}")
    if not _SHARD.fullmatch(_typed(given["file"], str)):
        raise ValueError(f"file is {given['file']!r}, no name of a shard")
    projection = Projection(
        name=_typed(given["name"], str),
        tensor=_typed(given["tensor"], str),
        module=given["module"],
        layer=None if given["layer"] is None else _index(given["layer"]),
        rows=rows,
        transposed=_typed(given["transposed"], bool),
        head=None if given["head"] is None else _index(given["head"]),
        columns=columns,
    )
    return _Entry(
        projection, shape, _dtype(given["dtype"]), factors, given["file"], _typed(given["checksum"], str)
    )


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.80} is no {kind.__name__}")
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is a ValueError, which JSON can say and nothing else can
    return value


def _index(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 62:
        raise ValueError(f"{value!r:.80} is no whole number from {least} on")
    return value


def _span(value: Any, least: int = 0) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2:
        raise ValueError(f"{value!r:.80} is no pair of numbers")
    return _index(value[0], least), _index(value[1], least)


def _range(value: Any) -> tuple[int, int]:
    start, stop = _span(value)
    if start >= stop:
        raise ValueError(f"{value!r} is no range")
    return start, stop


def _dtype(name: Any) -> torch.dtype:
    found = TORCH_DTYPES.get(name) if isinstance(name, str) else None
    if found is None or not found.is_floating_point:
        raise ValueError(f"dtype {name!r:.80} is none of a weight that torch {torch.__version__} has")
    return found


def _read_shard(path: Path, entries: Sequence[_Entry], rule: Rank) -> Iterator[MatrixBasis]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {BASIS_FILE} names it; {_LOST}")
    try:
        with safe_open(str(path), framework="pt") as file:
            for entry in entries:
                name = entry.projection.name
                found = tuple(file.get_tensor(f"{name}/{part}") for part in _PARTS)
                _check(path, entry, found)
                w, u, s, vh = (fresh(tensor) for tensor in found)
                yield matrix_basis(name, w, (u, s, vh), rule)
    except RlspecError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}; {_LOST}") from None


def _check(path: Path, entry: _Entry, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors that are not those of the matrix."""
    name, (m, n) = entry.projection.name, entry.shape
    r = min(m, n)
    shapes = ((m, n), (m, r), (r,), (r, n))
    dtypes = (entry.dtype, entry.factors, torch.float64, entry.factors)
    for part, tensor, shape, dtype in zip(_PARTS, tensors, shapes, dtypes, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{path}: {part} of {name!r} is {tuple(tensor.shape)} of {tensor.dtype}; {BASIS_FILE} wants {shape} of "
                f"{dtype}; {_LOST}"
            )
    if checksum(tensors) != entry.checksum:
        raise CheckpointError(f"{path}: {name!r} is damaged: not the checksum of {BASIS_FILE}; {_LOST}")
    for part, tensor in zip(_PARTS, tensors, strict=True):
        check_finite(f"{path}: {part} of {name!r}", tensor)
    s = tensors[2]
    if bool((s < 0).any()) or bool((s[1:] > s[:-1]).any()):
        raise CheckpointError(
            f"{path}: S of {name!r} are no singular values: they must fall, and none be below 0"
        )
