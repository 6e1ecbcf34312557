"""One degree of a Chebyshev filter: a product with ``C = AᵀA``, and the three-term recurrence that follows it.

Axes: ``L`` matrices, ``n`` dimension of C, ``c`` columns of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def chebyshev_step(
    apply: Callable[[Tensor], Tensor],
    current: Tensor,
    previous: Tensor | None,
    edge: Tensor,
    correction: Correction | None = None,
) -> Tensor:
    """The next block of a Chebyshev recurrence on [0, edge].

    ``2 X y - y_prev`` with ``X = 2C/edge - I``, or ``X y`` without a previous block. With a correction
    ``following·(2 X y + 4/edge·residual - ratio·y_prev)``, column by column.

    Args:
        apply: ``C``, a :class:`Moments` or any function (L, n, c) to (L, n, c).
        current, previous: (L, n, c), float32 or float64; a correction needs a previous block.
        edge: (L, 1, 1), positive, where the blocks are.
    """
    if isinstance(apply, Moments) and in_kernel(apply.matrix, current.shape[-1]):
        return _in_kernel(apply, current, previous, edge, correction)
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


def _in_kernel(
    moments: Moments, current: Tensor, previous: Tensor | None, edge: Tensor, correction: Correction | None
) -> Tensor:
    from rlspec.kernels.chebyshev_step import chebyshev_step_triton

    one = torch.ones_like(current[:, :1])
    if previous is None:
        factors = [2 / edge * one, -one, 0 * one, 0 * one]
    elif correction is None:
        factors = [4 / edge * one, -2 * one, -one, 0 * one]
    else:
        following = correction.following
        product = 4 / edge * following
        factors = [product, -2 * following, -correction.ratio * following, product]
    image = current if moments.formed else moments.matrix.mT @ current
    return chebyshev_step_triton(
        moments.matrix,
        image,
        current,
        current if previous is None else previous,
        None if correction is None else correction.residual,
        torch.cat(factors, dim=1),
    )
