"""Weights by name, whatever holds them: a module, a mapping of tensors, or a checkpoint folder on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from rlspec.errors import TensorError
from rlspec.io.fused import Config
from rlspec.io.projections import Projection, check_finite, counterpart, read_config, text_config

WeightSource = nn.Module | Mapping[str, Tensor] | str | Path

# Wrappers put these before the names of the module they wrap.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class Weights(Protocol):
    """Named tensors, read one at a time."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor."""
        ...

    def config(self) -> Config | None:
        """The model's configuration, which tells how fused projections are laid out; None where there is none."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor, detached; it may share memory with its owner.

        Raises:
            TensorError: no tensor of that name.
        """
        ...


def open_weights(source: WeightSource) -> Weights:
    """Give any weight source the same face."""
    if isinstance(source, nn.Module):
        return _TensorMapping(source.state_dict(), _module_config(source))
    if isinstance(source, Mapping):
        return _TensorMapping(source)
    return _Checkpoint(Path(source))


def read_matrix(weights: Weights, projection: Projection, *, check: bool = True) -> Tensor:
    """The two-dimensional weight (m, n) of a projection, out x in; with ``check`` it is known to be finite.

    Fused tensors are sliced, transposed layouts (GPT-2's Conv1D) turned round, sharded tensors gathered.

    Raises:
        TensorError: the tensor is missing, is not a floating matrix, or holds NaN or infinity.
    """
    tensor = weights.tensor(projection.tensor)
    if hasattr(tensor, "full_tensor"):  # a DTensor of FSDP2 or tensor parallelism
        tensor = tensor.full_tensor()
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise TensorError(
            f"{projection.tensor}: expected a floating-point matrix, "
            f"found {tensor.dtype} {tuple(tensor.shape)}"
        )
    tensor = projection.take(tensor)
    if check:
        check_finite(projection.name, tensor)
    return tensor


class _TensorMapping:
    def __init__(self, tensors: Mapping[str, Tensor], config: Config | None = None) -> None:
        self._tensors = {strip_wrappers(name): t for name, t in tensors.items() if isinstance(t, Tensor)}
        self._config = config

    def config(self) -> Config | None:
        return self._config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tied tensors count once, under the first of their names, as in the checkpoint that would be saved."""
        seen = set()
        shapes = {}
        for name, tensor in self._tensors.items():
            if not (tensor.is_meta or hasattr(tensor, "full_tensor")):
                memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
                if tensor.numel() > 0 and memory in seen:
                    continue
                seen.add(memory)
            shapes[name] = tuple(tensor.shape)
        return shapes

    def tensor(self, name: str) -> Tensor:
        found = counterpart(name, self._tensors)
        if found is None:
            raise TensorError(f"{name}: no such tensor in the weights given")
        return self._tensors[found].detach()


class _Checkpoint:
    def __init__(self, folder: Path) -> None:
        # Imported here: the reader needs the compiled extension, tensors in memory do not.
        from rlspec.io.index import CheckpointIndex

        self._index = CheckpointIndex.open(folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry.shape) for name, entry in self._index.tensors.items()}

    def config(self) -> Config | None:
        return read_config(self._index.path)

    def tensor(self, name: str) -> Tensor:
        from rlspec.io.stream import read_tensor

        found = counterpart(name, self._index.tensors)
        if found is None:
            raise TensorError(f"{name}: no such tensor in the checkpoint")
        return read_tensor(self._index, found)


def _module_config(module: nn.Module) -> Config | None:
    """What a Hugging Face model knows of itself, also inside a wrapper such as DistributedDataParallel."""
    for owner in (module, getattr(module, "module", None), getattr(module, "_orig_mod", None)):
        config = getattr(owner, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            return text_config(config.to_dict())
    return None


def strip_wrappers(name: str) -> str:
    """A parameter name without what wrappers such as DistributedDataParallel put before it."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    return name
