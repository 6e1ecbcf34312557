"""Choosing matrices of a stack. Decisions are made on the host, so positions are plain integers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlspec.linalg.transfer import index_on


def take(stack: Tensor, positions: Sequence[int]) -> Tensor:
    """The entries (matrices) of the given positions, which do not repeat; in order, all of them without a copy."""
    if len(positions) == stack.shape[0]:
        return stack
    return stack[index_on(positions, stack)]


def put(stack: Tensor, positions: Sequence[int], values: Tensor) -> Tensor:
    """A copy with the given positions, in ascending order, taken from ``values``."""
    if len(positions) == stack.shape[0]:
        return values
    return stack.index_copy(0, index_on(positions, stack), values)


def positions_of(mask: Tensor) -> list[int]:
    """Where a CPU mask (L,) holds."""
    return [i for i, there in enumerate(mask.tolist()) if there]
