"""A model of torch.distributed.checkpoint as the tuned one of a restoration: its tensors under the names of its base.

Its files are parts, which no output could follow. The output is laid out as the base is, and every tensor of it is
written anew; so both must have the same tensors, in the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from rlspec.errors import CheckpointError
from rlspec.io.counterparts import Names
from rlspec.io.distributed import DistributedTensor
from rlspec.io.distributed_weights import DistributedWeights
from rlspec.io.dtypes import stored_name
from rlspec.io.index import CheckpointIndex, TensorEntry, distributed_places, merged_first
from rlspec.io.projections import modules_in
from rlspec.io.quantised import companions, is_quantised
from rlspec.io.stream import aligned
from rlspec.io.tied import Tie, find_tie
from rlspec.io.weights import open_weights

# How much of each of two tensors is held while they are compared.
_COMPARED_BYTES = 1 << 25


@dataclass(frozen=True)
class DistributedModel:
    """What to write of such a model, by the base's names.

    Attributes:
        path: the folder with ``.metadata``.
        entries: every tensor, in the order of the base's files: its dtype, shape and size, at no place in particular.
        notes: what of it is not written, and why.
    """

    path: Path
    entries: dict[str, TensorEntry]
    notes: tuple[str, ...]
    _weights: DistributedWeights
    _names: dict[str, str]  # the base's name -> its own

    @classmethod
    def open(cls, folder: Path, base: CheckpointIndex) -> DistributedModel:
        """Read ``.metadata`` and find the base's tensors in it.

        A head that the base ties to its embedding may be there or not; it must be a copy of that, and both are read.

        Raises:
            CheckpointError: it is not whole or malformed, or holds other tensors than its base.
        """
        weights = open_weights(folder)
        assert isinstance(weights, DistributedWeights)
        model = cls(weights.folder, {}, (), weights, {})
        tie = find_tie(base)
        model._take(base, tie)
        left = set(weights.tensors) - set(model._names.values())
        if tie is not None and not tie.stored and tie.embed in model.entries:
            head = next((own for own in left if _is_head(own, weights.tensors[own].shape)), None)
            if head is not None and model._equal(model._names[tie.embed], head):
                left.discard(head)
                told = f"{head}: a copy of {tie.embed}, which the base stores once for both; written once"
                model = cls(model.path, model.entries, (told,), weights, model._names)
        if left:
            model._refuse(
                f"holds {min(left)} of shape {list(weights.shapes()[min(left)])}, which", "has not", base
            )
        return model

    def _take(self, base: CheckpointIndex, tie: Tie | None) -> None:
        """Find each of the base's tensors."""
        codes = companions(base.tensors)
        here = Names(self._weights.tensors)
        for name, entry in base.tensors.items():
            if is_quantised(name) or name in codes:
                raise CheckpointError(
                    f"{entry.shard}: {name} is stored as codes, and {self.path} holds numbers: no output is laid out "
                    "like both; dequantise the base first"
                )
            own = here.counterpart(name) or self._head(entry)
            if own is None and tie is not None and tie.said and name == tie.head:
                own = here.counterpart(tie.embed)
            if own is None:
                self._refuse(f"lacks {name}, which", "has", base)
            tensor = self._weights.tensors[own]
            if tensor.shape != tuple(entry.shape):
                self._refuse(f"{own} is {list(tensor.shape)}, which", f"has as {list(entry.shape)}", base)
            size = prod(tensor.shape) * tensor.dtype.itemsize
            self._names[name] = own
            self.entries[name] = TensorEntry(
                name, self.path, stored_name(tensor.dtype), tensor.shape, 0, size
            )

    def _head(self, entry: TensorEntry) -> str | None:
        """The only head, for a head: transformers calls GPT-NeoX's one thing in memory and another on disk."""
        if not _is_head(entry.name, entry.shape):
            return None
        heads = [own for own, tensor in self._weights.tensors.items() if _is_head(own, tensor.shape)]
        return heads[0] if len(heads) == 1 else None

    def _refuse(self, what: str, of_base: str, base: CheckpointIndex) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: {what} its base {base.path} {of_base}; the output is laid out as the base is. If that is the "
            f"base, {merged_first(self.path)}"
        )

    @property
    def files(self) -> set[Path]:
        """The files that its parts lie in."""
        return {part.file for own in self._names.values() for part in self._tensor(own).parts}

    def _tensor(self, own: str) -> DistributedTensor:
        return self._weights.tensors[own]

    def is_alike(self, tie: Tie) -> bool:
        """Whether embedding and head, both of which the base stores, are one matrix here."""
        embed, head = self._names[tie.embed], self._names[tie.head]
        return embed == head or self._equal(embed, head)

    def _equal(self, one: str, other: str) -> bool:
        """Whether two of its tensors hold the same bits."""
        a, b = self._tensor(one), self._tensor(other)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        streams = [self._weights.rows(own, memory_bytes=_COMPARED_BYTES) for own in (one, other)]
        return all(torch.equal(_bits(x), _bits(y)) for _, x, y in aligned(*streams))

    def comes_by_rows(self, name: str) -> bool:
        """Whether its parts are rows of it, so that it need not be held whole."""
        return self._weights.has_rows(self._names[name])

    def rows(self, name: str, *, memory_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """A tensor in blocks of rows, see :meth:`DistributedWeights.rows`."""
        return self._weights.rows(self._names[name], memory_bytes=memory_bytes)

    def pairs(
        self, base: CheckpointIndex, names: Sequence[str], *, memory_bytes: int
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Tensors of the base beside these, as ``stream_pairs`` gives them of two safetensors checkpoints.

        Args:
            memory_bytes: bound on what is read and held of both; a tensor that is made of several parts comes on top.
        """
        return self._weights.pairs(
            [base.tensors[name] for name in names], [self._names[name] for name in names], memory_bytes
        )


def is_distributed_model(tuned: Path) -> bool:
    """Whether a path holds one, or several, of which ``open`` tells."""
    return bool(distributed_places(tuned))


def _is_head(name: str, shape: tuple[int, ...]) -> bool:
    return modules_in(name, shape) == ("lm_head",)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
