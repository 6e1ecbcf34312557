"""Weights by name, whatever holds them: a module, a mapping of tensors, or a checkpoint folder on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlspec.backend import where_computed
from rlspec.errors import CheckpointError, TensorError, check_type
from rlspec.io.counterparts import Names
from rlspec.io.fused import Config
from rlspec.io.module import (
    ModuleTensors,
    adds_lora,
    gathered,
    lora_terms,
    module_config,
    strip_wrappers,
    with_adapters,
)
from rlspec.io.projections import Projection, read_config
from rlspec.io.quantised import block_size, companions, dequantised, scales_of
from rlspec.io.requantised import ScaledCodes
from rlspec.io.updates import Update

if TYPE_CHECKING:
    from rlspec.io.index import CheckpointIndex, TensorEntry

# What reading a folder ahead may hold, where its largest tensor does not need more.
READ_AHEAD_BYTES = 1 << 27
# What two tensors may take in the reader's memory beside their own bytes.
_SLACK_BYTES = 1 << 15


def open_weights(source: WeightSource) -> Weights:
    """Give any weight source the same face.

    Raises:
        OptionError: it is none.
        CheckpointError: a checkpoint cannot be read.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        return _ModuleWeights(source)
    if isinstance(source, Mapping):
        return _TensorMapping(source)
    wanted = "a module, a mapping of names to tensors, or the path of a checkpoint"
    check_type("model", source, (str, Path), wanted)
    return _open_checkpoint(Path(source))


def _open_checkpoint(path: Path) -> Weights:
    from rlspec.io.distributed_weights import DistributedWeights
    from rlspec.io.index import distributed_places

    places = distributed_places(path)
    if len(places) > 1:
        raise CheckpointError(
            f"{path}: holds {len(places)} models, {places[0].name} and others; give the folder of one"
        )
    return DistributedWeights(places[0]) if places else CheckpointWeights(path)


def find_tensor(name: str, names: Names | Collection[str], where: str, kind: str = "tensor") -> str:
    """The tensor that ``name`` stands for among ``names``, which may differ in the prefix.

    Args:
        names: :class:`Names` where several are looked for.
        where, kind: what messages call the place and what is looked for.

    Raises:
        TensorError: there is none, or several, as where two models lie in one module.
    """
    found = Names.of(names).counterparts(name)
    if len(found) == 1:
        return found[0]
    if found:
        raise TensorError(
            f"{name}: {len(found)} {kind}s in {where} could be it, {found[0]} and {found[1]}; give the model that is "
            "meant alone"
        )
    raise TensorError(f"{name}: no such {kind} in {where}")


class Weights:
    """Named tensors of one source, read one after the other."""

    #: what messages call the source
    where = "the weights given"
    #: whether parts of a tensor that wait for their turn are copied, so that the tensor itself may go
    _copies_parts = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor, as it is stored."""
        raise NotImplementedError

    def config(self) -> Config | None:
        """The model's configuration, which tells how fused projections are laid out; None where there is none."""
        raise NotImplementedError

    def on(self, device: torch.device) -> Weights:
        """The same weights, of which streams may put what they read on a device, by copies that run while the next
        tensors are read; those in memory stay where they are. Whoever wants all of them there moves the rest."""
        return self

    def in_file_order(self, projections: Iterable[Projection]) -> list[Projection]:
        """Projections as their tensors lie on disk; of weights in memory, as given."""
        return list(projections)

    def stream(self, projections: Sequence[Projection]) -> Iterator[tuple[Projection, Tensor]]:
        """The matrices of projections in the order given; a tensor that holds several of them is read once.

        Fused tensors are sliced, transposed layouts (GPT-2's Conv1D) turned round, sharded tensors gathered, scaled fp8
        is dequantised to float32, adapters are added. A checkpoint's tensors are read ahead; drop a matrix, or copy it,
        before many others are asked for.

        Yields:
            Each projection and its weight (m, n), out x in, detached; it may share memory with its owner. Whether its
            values are finite is not looked at.

        Raises:
            TensorError: there is no tensor of that name, or none that can be told, before anything is read; in
                iteration: a tensor has no values, is no floating matrix, or holds codes that cannot be read as numbers.
        """
        return self._matrices(projections, self._tensor_names(projections), add=True)

    def stream_apart(
        self, projections: Sequence[Projection]
    ) -> Iterator[tuple[Projection, Tensor, Update | None]]:
        """As :meth:`stream`, with what LoRA adapters add beside the matrix that they add it to.

        Yields:
            Each projection, its matrix and the update, which has no columns where the adapters leave this matrix alone.
            None: there are no adapters, or what they add is in the matrix already.

        Raises:
            TensorError: as :meth:`stream`.
        """
        names = self._tensor_names(projections)
        matrices = self._matrices(projections, names, add=False)
        for name in names:
            projection, matrix = next(matrices)
            adds = self._adds(name)
            update = self._update(name).part(projection) if adds else None
            yield projection, matrix, Update.none(matrix) if adds is False else update
            del matrix  # before the next one is asked for

    def _tensor_names(self, projections: Sequence[Projection]) -> list[str]:
        names = Names(self._names())
        return [find_tensor(projection.tensor, names, self.where) for projection in projections]

    def _matrices(
        self, projections: Sequence[Projection], names: Sequence[str], *, add: bool
    ) -> Iterator[tuple[Projection, Tensor]]:
        places: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            places.setdefault(name, []).append(place)
        stored = self._tensors_of(list(places))
        waiting: dict[int, Tensor] = {}
        for place, (projection, name) in enumerate(zip(projections, names, strict=True)):
            if place not in waiting:
                waiting.update(self._parts(name, next(stored), projections, places[name], add=add))
            yield projection, waiting.pop(place)

    def _parts(
        self,
        name: str,
        stored: Tensor,
        projections: Sequence[Projection],
        places: Sequence[int],
        *,
        add: bool,
    ) -> dict[int, Tensor]:
        """The matrices that a tensor holds, by their places among the projections.

        Args:
            add: to the tensor what adapters add, also where :meth:`_update` can tell it apart.
        """
        with self._file_named(name):
            whole = self._decoded(name, stored)
            if add or self._adds(name) is None:
                whole = self._adapted(name, whole)
            if whole.ndim != 2 or not whole.is_floating_point():
                raise TensorError(
                    f"{name}: expected a floating-point matrix, found {whole.dtype} {tuple(whole.shape)}"
                )
        copied = self._copies_parts and len(places) > 1
        parts = ((place, projections[place].take(whole)) for place in places)
        return {place: part.clone() if copied else part for place, part in parts}

    def _file_named(self, name: str) -> AbstractContextManager[None]:
        """Context that puts the file in front of a TensorError about a tensor, where the weights lie in one."""
        return nullcontext()

    def _names(self) -> Collection[str]:
        raise NotImplementedError

    def _load(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        raise NotImplementedError

    def _tensors_of(self, names: Sequence[str]) -> Iterator[Tensor]:
        """Tensors as they are stored, in order."""
        return map(self._load, names)

    def _decoded(self, name: str, stored: Tensor) -> Tensor:
        """A stored tensor as the numbers that the model computes with."""
        beside = self._companions.get(name, [])
        checked = _with_values(name, stored)
        return dequantised(name, checked, beside, lambda n: _with_values(n, self._load(n)), self._block)

    def _adapted(self, name: str, weight: Tensor) -> Tensor:
        """The numbers of a tensor with what adapters make of them."""
        return weight

    def _adds(self, name: str) -> bool | None:
        """Whether adapters add to a tensor what :meth:`_update` tells, and do no more. False: there are adapters, and
        they leave it as it is. None: there are none, or :meth:`_adapted` alone knows."""
        return None

    def _update(self, name: str) -> Update:
        """What adapters add to a tensor, as it is stored; where they do, see :meth:`_adds`."""
        raise NotImplementedError

    @cached_property
    def _companions(self) -> dict[str, list[str]]:
        return companions(self._names())

    @cached_property
    def _block(self) -> tuple[int, int] | None:
        return block_size(self.config())


class _TensorMapping(Weights):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {strip_wrappers(name): t for name, t in tensors.items() if isinstance(t, Tensor)}

    def config(self) -> Config | None:
        return None

    def _names(self) -> Collection[str]:
        return self._tensors.keys()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self._tensors)

    def _load(self, name: str) -> Tensor:
        return where_computed(gathered(self._tensors[name].detach()))


class _ModuleWeights(Weights):
    where = "the model given"

    def __init__(self, module: nn.Module) -> None:
        self._held = ModuleTensors(module, module.state_dict())
        self._config = module_config(module)

    def config(self) -> Config | None:
        return self._config

    def _names(self) -> Collection[str]:
        return self._held.tensors.keys()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self._held.tensors)

    def _load(self, name: str) -> Tensor:
        return where_computed(self._held.value(name))

    def _adapted(self, name: str, weight: Tensor) -> Tensor:
        layer = self._held.adapter(name)
        return weight if layer is None else with_adapters(name, layer, weight)

    def _adds(self, name: str) -> bool | None:
        layer = self._held.adapter(name)
        if layer is None:
            return False if self._held.is_adapted else None
        return True if adds_lora(layer) else None

    def _update(self, name: str) -> Update:
        return Update.of(lora_terms(self._held.adapter(name)))


def read_ahead_bytes(entries: Iterable[TensorEntry]) -> int:
    """What reading tensors ahead may hold: one that is in use, one that is read meanwhile, or more small ones."""
    largest = max((entry.end - entry.start for entry in entries), default=0)
    return max(READ_AHEAD_BYTES, 2 * largest + _SLACK_BYTES)


class CheckpointWeights(Weights):
    """A safetensors checkpoint on disk, its headers read once."""

    _copies_parts = True
    _device = torch.device("cpu")  #: where streams put tensors of numbers

    def __init__(self, folder: Path) -> None:
        # Here and below: the reader needs the compiled extension, tensors in memory do not.
        from rlspec.io.index import CheckpointIndex

        self._take(CheckpointIndex.open(folder))

    @classmethod
    def of(cls, index: CheckpointIndex) -> CheckpointWeights:
        """The weights of a checkpoint whose headers are at hand."""
        weights = cls.__new__(cls)
        weights._take(index)
        return weights

    def _take(self, index: CheckpointIndex) -> None:
        self._index = index
        self.where = f"the checkpoint {index.path}"

    def on(self, device: torch.device) -> Weights:
        moved = copy(self)
        moved._device = device
        return moved

    def config(self) -> Config | None:
        return read_config(self._index.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry.shape) for name, entry in self._index.tensors.items()}

    def in_file_order(self, projections: Iterable[Projection]) -> list[Projection]:
        from rlspec.io.stream import in_file_order

        place = {entry.name: at for at, entry in enumerate(in_file_order(self._index))}
        # One that is not there is refused when it is to be read.
        return sorted(projections, key=lambda projection: place.get(projection.tensor, -1))

    def scale_of(self, name: str) -> str | None:
        """The tensor that scales the codes of a weight; None where the weight is stored as numbers.

        Raises:
            TensorError: codes of a scheme that is not known, or a scale that does not fit. Headers tell, nothing is read.
        """
        beside = self._companions.get(name, [])
        with self._file_named(name):
            dequantised(name, self._empty(name), beside, self._empty, self._block)
        return next(iter(scales_of(name, beside)), None)

    def numbers(self, name: str, stored: Tensor) -> Tensor:
        """What a tensor that was read stands for: scaled fp8 dequantised to float32, all else as it is.

        Raises:
            TensorError: as `scale_of`.
        """
        with self._file_named(name):
            return self._decoded(name, stored)

    def codes(self, name: str, stored: Tensor, scale: str) -> ScaledCodes:
        """A matrix that was read, with its scale, as `scale_of` names that."""
        return ScaledCodes(name, stored, scale, self._load(scale), self._block)

    def _empty(self, name: str) -> Tensor:
        """A tensor's dtype and shape, without values."""
        from rlspec.io.dtypes import torch_dtype

        entry = self._index.tensors[name]
        return torch.empty(entry.shape, dtype=torch_dtype(entry), device="meta")

    @contextmanager
    def _file_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except TensorError as error:
            raise TensorError(f"{self._index.tensors[name].shard}: {error}") from None

    def _names(self) -> Collection[str]:
        return self._index.tensors.keys()

    def _load(self, name: str) -> Tensor:
        from rlspec.io.stream import read_tensor

        return read_tensor(self._index, name)

    def _tensors_of(self, names: Sequence[str]) -> Iterator[Tensor]:
        from rlspec.io.stream import TensorStream

        memory = read_ahead_bytes([self._index.tensors[name] for name in names])
        # Codes meet their scales on the host, and one tensor alone has none to be copied beside.
        on_host = len(names) < 2 or any(self._companions.get(name) for name in names)
        device = torch.device("cpu") if on_host else self._device
        with TensorStream(self._index, names, memory_bytes=memory, device=device) as stream:
            for _ in names:
                yield next(stream).tensor  # which no name here keeps while the next one is asked for


WeightSource = nn.Module | Mapping[str, Tensor] | str | Path | Weights


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Tied tensors count once, under the first of their names, as in the checkpoint that would be saved."""
    seen = set()
    shapes = {}
    for name, tensor in tensors.items():
        if not (tensor.is_meta or tensor.layout != torch.strided or hasattr(tensor, "full_tensor")):
            memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() > 0 and memory in seen:
                continue
            seen.add(memory)
        shapes[name] = tuple(tensor.shape)
    return shapes


def _with_values(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise TensorError(f"{name}: on the meta device, it has no values; load the weights first")
    if tensor.layout != torch.strided:
        raise TensorError(f"{name}: a sparse tensor ({tensor.layout}); give its to_dense()")
    return tensor
