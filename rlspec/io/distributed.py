"""The index of a checkpoint of torch.distributed.checkpoint (DCP): which part of which tensor lies in which file.

Such a folder has the file ``.metadata``, which is written last, and ``__R_I.distcp`` of process R with the parts that it
held, one archive of `torch.save` after the other. accelerate puts one below the checkpoint's folder for the model, and
another for the optimizer. The files may come from anyone: ``.metadata`` is a pickle, and is read as plain data; it may
name files of its own folder only, and the parts of a tensor must fill it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from rlspec.errors import CheckpointError
from rlspec.io.dtypes import TORCH_DTYPES
from rlspec.io.files import read_error
from rlspec.io.index import METADATA_FILE, file_below
from rlspec.io.module import strip_wrappers
from rlspec.io.pickled import Made, Named, read_pickle
from rlspec.io.saved import dtype_named, whole_numbers
from rlspec.io.tiling import fault_of

# One of 64 processes' parts of a model of 80 layers, with its optimizer, has about 30 MiB.
_LARGEST_METADATA = 1 << 28
_MOST_PARTS = 1 << 16  # of one tensor
_MOST_PARTS_IN_ALL = 1 << 22  # looked at in some seconds: one list may be that of any number of tensors
_LONGEST_NAME = 1 << 12  # in characters: what shares one is again a few bytes
_DEEPEST = 64  # dictionaries in one another

_DCP = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where torch before 2.3 has two of them
_TENSOR = f"{_DCP}.metadata.TensorStorageMetadata"
_INFO = f"{_DCP}.filesystem._StorageInfo"
_CLASSES = {
    *(
        f"{_DCP}.metadata.{name}"
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_SHARDED}.TensorProperties",
    f"{_SHARDED}.MEM_FORMAT_ENCODING",
    _INFO,
    "torch.Size",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
}

_WANTED = "what torch.distributed.checkpoint writes"

# What a state of an optimizer lies in: optimizer, optim, optimizers, optimizer_0, optim_state.
_OPTIMIZER = re.compile(r"optim(izer)?s?($|_)", re.IGNORECASE)
_MEGATRON = "export it to Hugging Face's with Megatron Bridge (AutoBridge.export_ckpt)"
# Names of tensors that are no Hugging Face model's, what they are, and what makes one of them.
_FOREIGN = (
    (
        re.compile(r"\.lora_(A|B|embedding_[AB])\.|\.base_layer\."),
        "the factors of a LoRA adapter",
        "write the adapter with save_pretrained of PEFT",
    ),
    (
        re.compile(r"(^|\.)layers\.\d+\.attn\.output_proj\.weight$|\.lora_[ab]\.weight$"),
        "a model in torchtune's layout, whose heads have their rows in another order",
        "write it with torchtune's FullModelHFCheckpointer",
    ),
    (
        re.compile(r"(^|\.)layers\.\d+\.attention\.wq\.weight$"),
        "a model in Meta's layout, whose heads have their rows in another order",
        "write it in Hugging Face's, in torchtitan by scripts/checkpoint_conversion/convert_to_hf.py",
    ),
    (
        re.compile(r"(^|\.)self_attention\.linear_qkv\."),
        "a model in Megatron's layout",
        _MEGATRON,
    ),
)


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and the archive that holds it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int  #: first byte of the archive in the file
    length: int


@dataclass(frozen=True)
class DistributedTensor:
    """One tensor on disk. Its parts, all of which have elements, fill it without overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class DistributedIndex:
    """Every tensor of the model by the name that it has there; an optimizer's are left out."""

    path: Path  #: the folder with ``.metadata``
    tensors: dict[str, DistributedTensor]

    @classmethod
    def open(cls, folder: Path) -> DistributedIndex:
        """Read ``.metadata``, and see that the files that it names are there and long enough.

        Raises:
            CheckpointError: a file is missing, cut off or malformed, parts do not make a tensor, or the model is in a
                layout that is none of Hugging Face; the message names the file.
        """
        metadata = _Metadata(folder)
        found = {name: metadata.tensor(key) for name, key in metadata.model_keys().items()}
        return cls(folder, found)


class _Metadata:
    """What ``.metadata`` says, each of its objects looked at when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / METADATA_FILE
        self._file_sizes: dict[Path, int] = {}
        self._parts_left = _MOST_PARTS_IN_ALL
        fields = self._fields(self._read(), f"{_DCP}.metadata.Metadata")
        self._described = _dict(fields.get("state_dict_metadata"))
        self._paths = _dict(fields.get("planner_data"))
        self._places: dict[str, dict[tuple[int, ...], Any]] = {}
        for index, place in _dict(fields.get("storage_data")).items():
            at = self._fields(index, f"{_DCP}.metadata.MetadataIndex")
            if at.get("offset") is not None:  # which what is no tensor has not
                self._places.setdefault(self._text(at.get("fqn")), {})[self._sizes(at["offset"])] = place

    def _read(self) -> Any:
        if not self._file.is_file():
            raise CheckpointError(
                f"{self._file}: missing; torch.distributed.checkpoint writes it last, so the checkpoint is not whole"
            )
        try:
            size = self._file.stat().st_size
            if size > _LARGEST_METADATA:
                raise CheckpointError(
                    f"{self._file}: {size} bytes, at most {_LARGEST_METADATA} are read of it"
                )
            content = self._file.read_bytes()
        except OSError as error:
            raise read_error(self._file, error) from None
        return read_pickle(content, allowed=self._allows, where=str(self._file), what=_WANTED)

    def _allows(self, name: str) -> bool:
        if name.startswith("megatron."):
            raise CheckpointError(
                f"{self._folder}: holds a model in Megatron's layout, which is not read; {_MEGATRON}"
            )
        return name in _CLASSES or dtype_named(name) is not None

    def model_keys(self) -> dict[str, str]:
        """The names of the model's tensors, each with its key."""
        owners: dict[str, list[tuple[str, str]]] = {}
        for key, described in self._described.items():
            if not isinstance(described, Made) or described.kind != _TENSOR or not isinstance(key, str):
                continue
            path = self._path(self._text(key))
            if not any(_OPTIMIZER.match(part) for part in (key.partition(".")[0], *path[:-1])):
                within = path[-2] if len(path) > 1 else ""
                owners.setdefault(strip_wrappers(path[-1]), []).append((within, key))
        found: dict[str, str] = {}
        for name, keys in owners.items():
            models = [key for within, key in keys if within == "model"] if len(keys) > 1 else [keys[0][1]]
            if len(models) == 1:
                found[name] = models[0]
            else:  # of which one cannot be told; neither bears the name
                found.update({key: key for _, key in keys})
        if not found:
            raise CheckpointError(f"{self._file}: no tensor of a model in it")
        for pattern, what, advice in _FOREIGN:
            if any(pattern.search(name) for name in found):
                raise CheckpointError(f"{self._folder}: holds {what}, which is not read; {advice}")
        return found

    def _path(self, key: str) -> list[str]:
        """Through which dictionaries a tensor was reached when it was saved, and its name in the last of them."""
        path = self._paths.get(key)
        if not isinstance(path, tuple) or not 0 < len(path) <= _DEEPEST:
            return [key]
        if not all(isinstance(part, (str, int)) for part in path):
            return [key]
        return [self._text(str(part)) for part in path]

    def tensor(self, key: str) -> DistributedTensor:
        """A tensor by its key.

        Raises:
            CheckpointError: its parts do not fill it, or lie in a file that is missing or cut off.
        """
        fields = self._fields(self._described[key], _TENSOR)
        shape, dtype = self._sizes(fields.get("size")), self._dtype(key, fields.get("properties"))
        chunks = fields.get("chunks")
        if not isinstance(chunks, list) or len(chunks) > _MOST_PARTS:
            raise self._malformed()
        self._parts_left -= len(chunks)
        if self._parts_left < 0:
            raise CheckpointError(
                f"{self._file}: more than {_MOST_PARTS_IN_ALL} parts, which is not {_WANTED}"
            )
        parts = []
        for chunk in chunks:
            box = self._fields(chunk, f"{_DCP}.metadata.ChunkStorageMetadata")
            offsets, sizes = self._sizes(box.get("offsets")), self._sizes(box.get("sizes"))
            if prod(sizes):
                parts.append(self._part(key, offsets, sizes))
        fault = fault_of(shape, [(part.offsets, part.shape) for part in parts])
        if fault is not None:
            raise CheckpointError(f"{self._file}: {key!r} of shape {list(shape)}: {fault}")
        return DistributedTensor(dtype, shape, tuple(parts))

    def _part(self, key: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Part:
        where = f"{self._file}: {key!r}, its part at {list(offsets)}"
        place = self._fields(self._places.get(key, {}).get(offsets), _INFO, f"{where}: in no file")
        name, start, length = self._text(place.get("relative_path")), place.get("offset"), place.get("length")
        if place.get("transform_descriptors"):
            raise CheckpointError(
                f"{where}: saved with an extension, which is not read; save without _extensions"
            )
        if type(start) is not int or type(length) is not int or min(start, length) < 0:
            raise self._malformed()
        file = file_below(self._folder, name, self._file)
        if start + length > self._size_of(file):
            raise CheckpointError(
                f"{file}: cut off: {self._size_of(file)} bytes, {METADATA_FILE} places {key!r} at bytes {start} to "
                f"{start + length}"
            )
        return Part(offsets, shape, file, start, length)

    def _size_of(self, file: Path) -> int:
        if file not in self._file_sizes:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing; {METADATA_FILE} names it")
            self._file_sizes[file] = file.stat().st_size
        return self._file_sizes[file]

    def _dtype(self, key: str, properties: Any) -> torch.dtype:
        state = properties.state if isinstance(properties, Made) else None
        named = state[0] if isinstance(state, tuple) and state else None
        dtype = dtype_named(named.name) if isinstance(named, Named) else None
        if dtype is None:
            raise self._malformed()
        if dtype not in TORCH_DTYPES.values():
            raise CheckpointError(f"{self._file}: {key!r} has dtype {dtype}, which is not read")
        return dtype

    def _text(self, value: Any) -> str:
        if not isinstance(value, str) or len(value) > _LONGEST_NAME:
            raise self._malformed()
        return value

    def _sizes(self, made: Any) -> tuple[int, ...]:
        """A torch.Size."""
        try:
            (sizes,) = made.arguments if isinstance(made, Made) and made.kind == "torch.Size" else ()
            return whole_numbers(sizes)
        except (TypeError, ValueError):
            raise self._malformed() from None

    def _fields(self, made: Any, kind: str, otherwise: str | None = None) -> Mapping[Any, Any]:
        """The attributes of an object."""
        if not isinstance(made, Made) or made.kind != kind or not isinstance(made.state, dict):
            raise self._malformed() if otherwise is None else CheckpointError(otherwise)
        return made.state

    def _malformed(self) -> CheckpointError:
        return CheckpointError(f"{self._file}: not {_WANTED}")


def _dict(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}
