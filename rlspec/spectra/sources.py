"""Weights by name, whatever holds them: a module, a mapping of tensors, or a checkpoint folder on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rlspec.errors import TensorError
from rlspec.io.fused import Config
from rlspec.io.projections import Projection, check_finite, counterparts, read_config
from rlspec.io.quantised import block_size, companions, dequantised
from rlspec.spectra.module import ModuleTensors, module_config, strip_wrappers, with_adapters


class Weights(Protocol):
    """Named tensors, read one at a time."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor, as it is stored."""
        ...

    def config(self) -> Config | None:
        """The model's configuration, which tells how fused projections are laid out; None where there is none."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One weight, detached; it may share memory with its owner. Scaled fp8 is dequantised to float32.

        Raises:
            TensorError: no tensor of that name, none with values, or codes that cannot be read as numbers.
        """
        ...


WeightSource = nn.Module | Mapping[str, Tensor] | str | Path | Weights


def open_weights(source: WeightSource) -> Weights:
    """Give any weight source the same face."""
    if isinstance(source, nn.Module):
        return _ModuleWeights(source)
    if isinstance(source, Mapping):
        return _TensorMapping(source)
    if isinstance(source, (str, Path)):
        return CheckpointWeights(Path(source))
    return source


def read_matrix(weights: Weights, projection: Projection, *, check: bool = True) -> Tensor:
    """The two-dimensional weight (m, n) of a projection, out x in; with ``check`` it is known to be finite.

    Fused tensors are sliced, transposed layouts (GPT-2's Conv1D) turned round, sharded tensors gathered.

    Raises:
        TensorError: the tensor is missing, is not a floating matrix, has no values, or holds NaN or infinity.
    """
    tensor = weights.tensor(projection.tensor)
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise TensorError(
            f"{projection.tensor}: expected a floating-point matrix, "
            f"found {tensor.dtype} {tuple(tensor.shape)}"
        )
    tensor = projection.take(tensor)
    if check:
        check_finite(projection.name, tensor)
    return tensor


def find_tensor(name: str, names: Collection[str], where: str, kind: str = "tensor") -> str:
    """The tensor that ``name`` stands for among ``names``, which may differ in the prefix.

    Args:
        where, kind: what messages call the place and what is looked for.

    Raises:
        TensorError: there is none, or several, as where two models lie in one module.
    """
    found = counterparts(name, names)
    if len(found) == 1:
        return found[0]
    if found:
        raise TensorError(
            f"{name}: {len(found)} {kind}s in {where} could be it, {found[0]} and {found[1]}; give the model that is "
            "meant alone"
        )
    raise TensorError(f"{name}: no such {kind} in {where}")


class _Named:
    """What every source does alike: find a tensor, and read it as numbers."""

    where = "the weights given"

    def names(self) -> Collection[str]:
        raise NotImplementedError

    def config(self) -> Config | None:
        raise NotImplementedError

    def load(self, name: str) -> Tensor:
        raise NotImplementedError

    @cached_property
    def _companions(self) -> dict[str, list[str]]:
        return companions(self.names())

    @cached_property
    def _block(self) -> tuple[int, int] | None:
        return block_size(self.config())

    def tensor(self, name: str) -> Tensor:
        return self.read(find_tensor(name, self.names(), self.where))

    def read(self, found: str) -> Tensor:
        stored = _with_values(found, self.load(found))
        beside = self._companions.get(found, [])
        return dequantised(found, stored, beside, lambda n: _with_values(n, self.load(n)), self._block)


class _TensorMapping(_Named):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {strip_wrappers(name): t for name, t in tensors.items() if isinstance(t, Tensor)}

    def config(self) -> Config | None:
        return None

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self._tensors)

    def load(self, name: str) -> Tensor:
        return _gathered(self._tensors[name].detach())


class _ModuleWeights(_Named):
    where = "the model given"

    def __init__(self, module: nn.Module) -> None:
        self._held = ModuleTensors(module, module.state_dict())
        self._config = module_config(module)

    def config(self) -> Config | None:
        return self._config

    def names(self) -> Collection[str]:
        return self._held.tensors.keys()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self._held.tensors)

    def load(self, name: str) -> Tensor:
        return self._held.value(name)

    def read(self, found: str) -> Tensor:
        weight = super().read(found)
        layer = self._held.adapter(found)
        return weight if layer is None else with_adapters(found, layer, weight)


class CheckpointWeights(_Named):
    """A safetensors checkpoint on disk, opened once and read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        # Imported here: the reader needs the compiled extension, tensors in memory do not.
        from rlspec.io.index import CheckpointIndex

        self._index = CheckpointIndex.open(folder)
        self.where = f"the checkpoint {folder}"

    def config(self) -> Config | None:
        return read_config(self._index.path)

    def names(self) -> Collection[str]:
        return self._index.tensors.keys()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry.shape) for name, entry in self._index.tensors.items()}

    def load(self, name: str) -> Tensor:
        from rlspec.io.stream import read_tensor

        return read_tensor(self._index, name)

    def read(self, found: str) -> Tensor:
        try:
            return super().read(found)
        except TensorError as error:
            raise TensorError(f"{self._index.tensors[found].shard}: {error}") from None


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


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor of FSDP2 or tensor parallelism; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _with_values(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise TensorError(f"{name}: on the meta device, it has no values; load the weights first")
    if tensor.layout != torch.strided:
        raise TensorError(f"{name}: a sparse tensor ({tensor.layout}); give its to_dense()")
    return tensor
