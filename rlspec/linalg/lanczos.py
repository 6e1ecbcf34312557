"""Where a spectrum lies, from a few Lanczos steps with random vectors: cheap beside any block of columns.

The steps run where the operator does; the few numbers they give are judged on the host.

Axes: ``b`` batch, ``n`` dimension, ``v`` random vectors, ``t`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlspec.linalg.dense import eigh
from rlspec.linalg.transfer import to_host

Operator = Callable[[Tensor], Tensor]

_VECTORS = 8
# The chance, over the random start, that a norm bound fails.
_FAILURE = 1e-9
#: Steps for :func:`norm_bound`.
BOUND_STEPS = 24


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
        The estimates (b, len(shares)) and the largest eigenvalue (b,), both float64 and on the host; the latter is a
        lower bound.
    """
    nodes, weights = _ritz_values(*to_host(tridiagonal(apply, start, steps)))
    b = nodes.shape[0]
    nodes, weights = nodes.reshape(b, -1), weights.reshape(b, -1)
    nodes, order = nodes.sort(dim=-1, descending=True)
    weights = torch.take_along_dim(weights, order, -1)
    # Each node stands for its weight of eigenvalues, half of them above it; interpolate between the middles.
    middle = weights.cumsum(-1) - weights / 2
    target = torch.tensor(list(shares), dtype=torch.float64) * weights.sum(-1, keepdim=True)
    right = torch.searchsorted(middle, target.contiguous()).clamp(1, nodes.shape[-1] - 1)
    low, high = torch.take_along_dim(middle, right - 1, -1), torch.take_along_dim(middle, right, -1)
    t = ((target - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    values = torch.take_along_dim(nodes, right - 1, -1) * (1 - t) + torch.take_along_dim(nodes, right, -1) * t
    return values.clamp_min(0), nodes[:, 0]


def norm_bound(diagonal: Tensor, off_diagonal: Tensor, dimension: int) -> Tensor:
    """An upper bound on an operator's largest eigenvalue that fails with probability below 1e-9 over the start.

    A Lanczos estimate from one random vector is below the truth by the factor 1 - e with probability at most
    1.648 sqrt(n) exp(-sqrt(e) (2t - 1)) (Kuczyński and Woźniakowski, SIAM J. Matrix Anal. 13, 1992, Theorem 4.2);
    the vectors are independent, so their failures multiply. The theorem speaks of vectors uniform on the sphere:
    start from Gaussian ones.

    Args:
        diagonal, off_diagonal: of :func:`tridiagonal` for a symmetric positive semidefinite operator, on the host.
        dimension: of the space where the operator acts.

    Returns:
        shape (b,), float64.
    """
    nodes, _ = _ritz_values(diagonal, off_diagonal)
    _, vectors, steps = diagonal.shape
    each = math.log(1.648 * math.sqrt(max(dimension, 1))) - math.log(_FAILURE) / vectors
    shortfall = min(0.5, (each / (2 * steps - 1)) ** 2)
    return nodes.reshape(nodes.shape[0], -1).amax(-1).clamp_min(0) / (1 - shortfall)


def random_start(b: int, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Gaussian vectors (b, n, v) of the dtype and on the device of ``like``, drawn on the CPU."""
    return torch.randn(b, n, _VECTORS, generator=generator, dtype=torch.float64).to(like)


def tridiagonal(apply: Operator, start: Tensor, steps: int = BOUND_STEPS) -> tuple[Tensor, Tensor]:
    """The Lanczos process from each start vector (b, n, v): diagonals (b, v, t) and off-diagonals (b, v, t - 1), float64.

    Args:
        apply: symmetric, (b, n, v) to (b, n, v).
        steps: t, at most n.
    """
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
        beta = beta.masked_fill(done, 0.0)
        previous, q = q, (z / beta.clamp_min(torch.finfo(z.dtype).tiny)).masked_fill_(done, 0.0)
        diagonal.append(alpha.squeeze(-2))
        off_diagonal.append(beta.squeeze(-2))
    side = torch.stack(off_diagonal, -1)[..., :-1]
    return torch.stack(diagonal, -1).double(), side.double()


def _ritz_values(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values (b, v, t) of each start vector and their weights, the squared first components; on the host."""
    tri = torch.diag_embed(diagonal)
    if off_diagonal.shape[-1] > 0:
        tri = tri + torch.diag_embed(off_diagonal, 1) + torch.diag_embed(off_diagonal, -1)
    values, vectors = eigh(tri)
    return values, vectors[..., 0, :].square()
