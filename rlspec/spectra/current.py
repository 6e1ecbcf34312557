"""The weights of a stack at one event: stored, or the reference and an update in factors, whose product is not formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlspec.errors import TensorError
from rlspec.io.projections import Projection, check_finite
from rlspec.io.updates import Update
from rlspec.perturb.delta import Delta, LowRankDelta, delta_between
from rlspec.perturb.matrix import MatrixBasis
from rlspec.perturb.reference import Reference, stack
from rlspec.spectra.measurement import Measurement, combine

T = TypeVar("T")


@dataclass(frozen=True)
class Current:
    """The current weights of L matrices (m, n) on one device, each in one of two forms, by position.

    ``stored``: W itself. ``updates``: W is the reference, every bit of it, plus this.
    """

    names: tuple[str, ...]
    stored: dict[int, Tensor]
    updates: dict[int, Update]

    @classmethod
    def of(
        cls,
        stream: Iterator[tuple[Projection, Tensor, Update | None]],
        matrices: Sequence[MatrixBasis],
        device: torch.device,
        reference: Reference | None,
    ) -> Current:
        """Take the next matrices of a stream, see ``Weights.stream_apart``.

        Args:
            reference: their factors on the device; None: nothing is compared with them.

        Raises:
            TensorError: one is of another shape than its reference, or holds NaN or infinity.
        """
        names: list[str] = []
        stored, updates = {}, {}
        # In this order zip asks the stream for no weight beyond the stack's.
        for i, (matrix, (projection, weight, update)) in enumerate(zip(matrices, stream)):
            if tuple(weight.shape) != matrix.shape:
                raise TensorError(
                    f"{projection.name}: the reference is {matrix.shape[0]}x{matrix.shape[1]}, this weight is "
                    f"{'x'.join(str(d) for d in weight.shape)}"
                )
            names.append(projection.name)
            weight = weight.to(device)
            if update is not None:
                update = update.to(device)
                if reference is not None and _equal(weight, reference.W[i]):
                    for factor in (update.left, update.right):
                        check_finite(f"the adapter of {projection.name}", factor)
                    updates[i] = update
                    continue
                weight = update.added_to(weight)
            # On a device the sums tell of NaN and infinity without making the host wait for each matrix.
            if device.type == "cpu":
                check_finite(projection.name, weight)
            stored[i] = weight
        return cls(tuple(names), stored, updates)

    def part(self, start: int, stop: int) -> Current:
        """The matrices from ``start`` up to ``stop``; nothing is copied."""

        def cut(held: dict[int, T]) -> dict[int, T]:
            return {i - start: one for i, one in held.items() if start <= i < stop}

        return Current(self.names[start:stop], cut(self.stored), cut(self.updates))

    def measured(
        self, engine: Callable[[Reference, Delta], Measurement], reference: Reference
    ) -> Measurement:
        """What an engine makes of the stack; ``reference`` holds its factors.

        Raises:
            TensorError: a weight on a device holds NaN or infinity, or the adapter's product overflows.
        """
        parts = []
        for delta, positions in self._deltas(reference):
            if reference.device.type != "cpu" or isinstance(delta, LowRankDelta):
                self._check_sums(delta, positions)
            parts.append((positions, engine(reference.select(positions), delta)))
        return parts[0][1] if len(parts) == 1 else combine(parts)

    def weights(self, reference: Reference) -> Tensor:
        """(L, m, n): the weights themselves; float64 where some are formed from factors."""
        if not self.updates:
            return stack(list(self.stored.values()))
        formed: dict[int, Tensor] = {}
        for delta, positions in self._deltas(reference):
            formed.update(zip(positions, delta.weight()))
        return stack([formed[i] for i in range(len(self.names))])

    def _deltas(self, reference: Reference) -> Iterator[tuple[Delta, list[int]]]:
        """The updates of each form and whose they are."""
        if self.stored:
            places = list(self.stored)
            yield delta_between(stack(list(self.stored.values())), reference.select(places).W), places
        if self.updates:
            places = list(self.updates)
            pairs = [(update.left, update.right) for update in self.updates.values()]
            yield LowRankDelta.stacked(pairs, reference.select(places).W), places

    def _check_sums(self, delta: Delta, positions: Sequence[int]) -> None:
        """Refuse NaN and infinity where the norms show them."""
        for i, norm in enumerate(delta.stats.weight_frobenius.tolist()):
            if not math.isfinite(norm):
                check_finite(self.names[positions[i]], delta.select([i]).weight().float())


def _equal(weight: Tensor, reference: Tensor) -> bool:
    """Whether both hold the same numbers; the reference may hold them in a wider dtype."""
    if torch.promote_types(weight.dtype, reference.dtype) != reference.dtype:
        return False
    return torch.equal(weight.to(reference.dtype), reference)
