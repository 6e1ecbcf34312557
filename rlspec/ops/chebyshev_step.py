"""One degree of a Chebyshev filter: a product with ``C = AᵀA``, and the three-term recurrence that follows it.

Axes: ``L`` matrices, ``n`` dimension of C, ``c`` columns of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from rlspec.ops.draws import Signs
from rlspec.ops.table import choose


@dataclass(frozen=True)
class Moments:
    """The operator ``C = AᵀA``, and what a kernel needs to apply it.

    ``matrix`` is C (L, n, n), symmetric, where ``formed``; Aᵀ (L, n, m) where two products cost less. ``apply`` is the
    operator in plain products.
    """

    matrix: Tensor
    formed: bool
    apply: Callable[[Tensor], Tensor]

    def __call__(self, y: Tensor) -> Tensor:
        return self.apply(y)


@dataclass(frozen=True)
class Correction:
    """What the recurrence of a scaled correction has besides: ``residual`` (L, n, c) of the vectors that it corrects,
    and ``ratio`` and ``following`` (L, 1, c), the polynomial's values of the degree before over this one's, and of this
    one's over the next's."""

    residual: Tensor
    ratio: Tensor
    following: Tensor


@dataclass(frozen=True)
class Bits:
    """A sketch of ±1 as a kernel reads it, ``words`` (L, ceil(n / 32), 8 ceil(c / 8)) int32; ``shape`` is (L, n, c)."""

    words: Tensor
    shape: tuple[int, int, int]


def sketch(apply: Callable[[Tensor], Tensor], signs: Signs, like: Tensor) -> Tensor | Bits:
    """A sketch as steps with ``apply`` take it: bits where a kernel multiplies it, else numbers like ``like``."""
    if not _runs_in_kernel(apply, signs.shape[-1]):
        return signs.dense(like)
    from rlspec.kernels.signs import signs_triton

    return Bits(signs_triton(signs.key, signs.shape, like.device), signs.shape)


def chebyshev_step(
    apply: Callable[[Tensor], Tensor],
    current: Tensor | Bits,
    previous: Tensor | Bits | None,
    edge: Tensor,
    correction: Correction | None = None,
) -> Tensor:
    """The next block of a Chebyshev recurrence on [0, edge].

    ``2 X y - y_prev`` with ``X = 2C/edge - I``, or ``X y`` without a previous block. With a correction
    ``following·(2 X y + 4/edge·residual - ratio·y_prev)``, column by column.

    Args:
        apply: ``C``, a :class:`Moments` or any function (L, n, c) to (L, n, c).
        current, previous: (L, n, c), float32 or float64, or what :func:`sketch` made for ``apply``; a correction needs a
            previous block.
        edge: (L, 1, 1), positive, of the blocks' dtype and where they are.
    """
    if _runs_in_kernel(apply, current.shape[-1]):
        return _in_kernel(apply, current, previous, edge, correction)
    assert not isinstance(current, Bits) and not isinstance(previous, Bits)
    step = apply(current)
    if previous is None:
        return step * (2 / edge) - current
    step.mul_(4 / edge).sub_(current, alpha=2)
    if correction is None:
        return step.sub_(previous)
    residual, ratio, following = correction.residual, correction.ratio, correction.following
    step.mul_(following)
    return step.addcmul_(residual, 4 / edge * following).addcmul_(previous, ratio * following, value=-1)


def in_kernel(matrix: Tensor, columns: int) -> bool:
    """Whether steps with ``matrix`` (L, n, .) run in the kernel, which wants rows without gaps."""
    return choose("chebyshev_step", matrix.device, (matrix.dtype,), (*matrix.shape, columns)) == "triton"


def _runs_in_kernel(apply: Callable[[Tensor], Tensor], columns: int) -> TypeGuard[Moments]:
    return isinstance(apply, Moments) and in_kernel(apply.matrix, columns)


def _in_kernel(
    moments: Moments,
    current: Tensor | Bits,
    previous: Tensor | Bits | None,
    edge: Tensor,
    correction: Correction | None,
) -> Tensor:
    from rlspec.kernels.chebyshev_step import chebyshev_step_triton

    one = edge.new_ones(*edge.shape[:2], current.shape[-1])
    if previous is None:
        factors = [2 / edge * one, -one, one, one]
    elif correction is None:
        factors = [4 / edge * one, -2 * one, -one, one]
    else:
        following = correction.following
        product = 4 / edge * following
        factors = [product, -2 * following, -correction.ratio * following, product]
    now, before = (block.words if isinstance(block, Bits) else block for block in (current, previous))
    assert now is not None
    image = now
    if not moments.formed:
        turned = moments.matrix.mT
        if isinstance(current, Bits):
            image = chebyshev_step_triton(turned, now, None, None, None, one.expand(-1, 4, -1))
        else:
            image = turned @ now
    residual = None if correction is None else correction.residual
    return chebyshev_step_triton(moments.matrix, image, now, before, residual, torch.cat(factors, dim=1))
