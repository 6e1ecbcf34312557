"""Choosing matrices of a stack."""

from __future__ import annotations

from torch import Tensor


def take(stack: Tensor, index: Tensor) -> Tensor:
    """The entries (matrices) of the given positions, which do not repeat; in order, all of them without a copy."""
    return stack if index.numel() == stack.shape[0] else stack[index]
