"""The Chebyshev filter of subspace iteration, acting on corrections.

A polynomial that is small on [0, edge] and large above it, applied to ``C = AᵀA``, suppresses the unwanted part of a
basis by ``T_d(x)`` with ``x = 2 theta/edge - 1``: the best that any polynomial of degree d can do. Filtering the
*correction* ``T_d(C) z / T_d(x) - z``, which starts from the residual, keeps errors of the products relative to the
residual (Kodali and others, arXiv 2503.22652), so that ``C`` may be formed once and in working precision.

Axes: ``b`` batch, ``n`` dimension, ``l`` columns, ``d`` degree.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlspec.linalg.products import aligned, transposed_product
from rlspec.ops.chebyshev_step import Correction, chebyshev_step, sketch
from rlspec.ops.draws import Signs

Operator = Callable[[Tensor], Tensor]


def growth(x: Tensor, degree: int) -> Tensor:
    """``log T_degree(x)`` for x >= 1, elementwise; 0 below."""
    angle = torch.arccosh(x.clamp_min(1.0))
    # log cosh(t) = t - log 2 + log(1 + exp(-2t)), which does not overflow.
    return degree * angle - math.log(2.0) + torch.log1p(torch.exp(-2.0 * degree * angle))


def degree_for(suppression: Tensor, x: Tensor, limit: int) -> int:
    """Smallest degree up to ``limit`` with ``T_degree(x) >= suppression`` for every element."""
    need = torch.arccosh(suppression.clamp_min(1.0)) / torch.arccosh(x.clamp_min(1.0 + 1e-6))
    return int(need.max().ceil().clamp(1, limit))


def filter_sketch(apply: Operator, y: Tensor | Signs, edge: Tensor, degree: int) -> Tensor:
    """``T_degree(2C/edge - I) y`` with columns scaled to length one.

    Args:
        apply: ``C``, (b, n, l) to (b, n, l).
        y: (b, n, l), random signs or vectors of the dtype of ``edge``.
        edge: upper end of the part to suppress, (b, 1, 1), positive, where C is.
    """
    previous = sketch(apply, y, edge) if isinstance(y, Signs) else y
    current = chebyshev_step(apply, previous, None, edge)
    for _ in range(degree - 1):
        previous, current = current, chebyshev_step(apply, current, previous, edge)
    return current / current.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(current.dtype).tiny)


def filter_correction(
    apply: Operator, z: Tensor, residual: Tensor, theta: Tensor, edge: Tensor, degree: int, held: int = 0
) -> Tensor:
    """``T_degree(2C/edge - I) z / T_degree(x)``, column by column, from the residual ``C z - z theta``.

    Columns whose Ritz value lies inside [0, edge] have nothing to gain and are returned as they are.

    Products run in the dtype of the residual, which may be narrower than that of ``z``: what they round is relative to
    the correction.

    Args:
        apply: ``C``, (b, n, l) to (b, n, l).
        z: Ritz vectors, (b, n, l), sorted by descending Ritz value.
        residual: (b, n, l).
        theta: Ritz values (b, l), on the host.
        edge: (b, 1, 1), positive, on the host.
        held: corrections are cleared of the first so many Ritz vectors at every degree. The searched space has them
            already, and a polynomial that grows enormously there would make rounding into most of a correction.

    Returns:
        (b, n, l), columns of length one, not orthogonal, in the dtype of ``z``.
    """
    edge = edge.to(residual.dtype)
    x = 2 * theta.to(residual.dtype).unsqueeze(-2) / edge - 1
    count = int((x > 1).sum(-1).max())
    if count == 0:
        return z
    count = aligned(count, z.shape[-1])
    x, edge = x[..., :count].to(z.device), edge.to(z.device)
    active = x > 1
    x = x.clamp_min(1.0)
    top = z[..., :held].to(residual)

    def cleared(block: Tensor) -> Tensor:
        return block if held == 0 else block.sub_(top @ transposed_product(top, block))

    residual = residual[..., :count]
    # With g_i = T_i(x) and correction D_i = T_i(C) z - g_i z, the scaled D_i/g_i needs only the ratios g_{i-1}/g_i.
    ratio = 1 / x
    previous = torch.zeros_like(residual)
    current = cleared(residual * (2 / edge * ratio))
    for _ in range(degree - 1):
        following = 1 / (2 * x - ratio)
        step = chebyshev_step(apply, current, previous, edge, Correction(residual, ratio, following))
        previous, current, ratio = current, cleared(step), following
    out = z.clone()
    out[..., :count] += torch.where(active, current, torch.zeros_like(current))
    return out / out.norm(dim=-2, keepdim=True)
