"""Where a spectrum lies, from a few Lanczos steps with random vectors: cheap beside any block of columns.

Axes: ``b`` batch, ``n`` dimension, ``v`` random vectors, ``t`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlspec.linalg.dense import eigh

Operator = Callable[[Tensor], Tensor]

_VECTORS = 8
# The chance, over the random start, that a norm bound fails.
_FAILURE = 1e-9


def spectrum_quantiles(
    apply: Operator, start: Tensor, shares: Sequence[float], steps: int = 16
) -> tuple[Tensor, Tensor]:
    """Estimates of eigenvalues by their rank, and of the largest (kernel-free spectral density of Lin, Saad and Yang,
    SIAM Review 58, 2016).

    Args:
        apply: a symmetric positive semidefinite operator, (b, n, v) to (b, n, v).
        start: random signs, shape (b, n, v).
        shares: ranks as shares of n, each in (0, 1): 0.2 asks for the eigenvalue that 20 % of all exceed.
        steps: Lanczos steps.

    Returns:
        The estimates (b, len(shares)) and the largest eigenvalue (b,), both float64; the latter is a lower bound.
    """
    nodes, weights = _ritz_values(apply, start, steps)
    b = nodes.shape[0]
    nodes, weights = nodes.reshape(b, -1), weights.reshape(b, -1)
    nodes, order = nodes.sort(dim=-1, descending=True)
    weights = torch.take_along_dim(weights, order, -1)
    # Each node stands for its weight of eigenvalues, half of them above it; interpolate between the middles.
    middle = weights.cumsum(-1) - weights / 2
    target = torch.tensor(list(shares), dtype=torch.float64, device=nodes.device) * weights.sum(
        -1, keepdim=True
    )
    right = torch.searchsorted(middle, target.contiguous()).clamp(1, nodes.shape[-1] - 1)
    low, high = torch.take_along_dim(middle, right - 1, -1), torch.take_along_dim(middle, right, -1)
    t = ((target - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    values = torch.take_along_dim(nodes, right - 1, -1) * (1 - t) + torch.take_along_dim(nodes, right, -1) * t
    return values.clamp_min(0), nodes[:, 0]


def norm_bound(apply: Operator, start: Tensor, dimension: int, steps: int = 24) -> Tensor:
    """An upper bound on the largest eigenvalue that fails with probability below 1e-9 over ``start``.

    A Lanczos estimate from one random vector is below the truth by the factor 1 - e with probability at most
    1.648 sqrt(n) exp(-sqrt(e) (2t - 1)) (Kuczyński and Woźniakowski, SIAM J. Matrix Anal. 13, 1992, Theorem 4.2);
    the vectors are independent, so their failures multiply. The theorem speaks of vectors uniform on the sphere:
    pass Gaussian ones.

    Args:
        apply: symmetric positive semidefinite operator, (b, n, v) to (b, n, v).
        start: Gaussian vectors, shape (b, n, v).
        dimension: of the space where the operator acts.
        steps: Lanczos steps.

    Returns:
        shape (b,), float64.
    """
    nodes, _ = _ritz_values(apply, start, steps)
    each = math.log(1.648 * math.sqrt(max(dimension, 1))) - math.log(_FAILURE) / start.shape[-1]
    shortfall = min(0.5, (each / (2 * steps - 1)) ** 2)
    return nodes.reshape(nodes.shape[0], -1).amax(-1).clamp_min(0) / (1 - shortfall)


def random_start(b: int, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Gaussian vectors (b, n, v) of the dtype and on the device of ``like``, drawn on the CPU."""
    return torch.randn(b, n, _VECTORS, generator=generator, dtype=torch.float64).to(like)


def _ritz_values(apply: Operator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values (b, v, t) of each start vector and their weights, the squared first components; float64."""
    steps = min(steps, start.shape[-2])
    q = start / start.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(start.dtype).tiny)
    previous = torch.zeros_like(q)
    beta = torch.zeros_like(q[..., :1, :])
    diagonal, off_diagonal = [], []
    for _ in range(steps):
        z = apply(q) - previous * beta
        alpha = (z * q).sum(-2, keepdim=True)
        z = z - q * alpha
        beta = z.norm(dim=-2, keepdim=True)
        # An exhausted Krylov space leaves only rounding; going on with it would be a new, unrelated run.
        done = beta <= 1e-6 * alpha.abs()
        beta = torch.where(done, torch.zeros_like(beta), beta)
        previous, q = q, torch.where(done, torch.zeros_like(z), z / beta.clamp_min(torch.finfo(z.dtype).tiny))
        diagonal.append(alpha.squeeze(-2))
        off_diagonal.append(beta.squeeze(-2))
    tri = torch.diag_embed(torch.stack(diagonal, -1).double())
    if steps > 1:
        side = torch.stack(off_diagonal[:-1], -1).double()
        tri = tri + torch.diag_embed(side, 1) + torch.diag_embed(side, -1)
    values, vectors = eigh(tri)
    return values, vectors[..., 0, :].square()
