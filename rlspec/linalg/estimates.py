"""Bounds on how far computed singular subspaces are from the true ones.

All bounds are on the largest principal angle's sine, left and right, between the leading k computed singular vectors
and the true ones. A bound that cannot be certified is infinite: a sine never exceeds 1, so anything at or above 1
says nothing either.

Axes: ``b`` batch, ``n`` dimension, ``k`` wanted columns, ``p >= k`` columns of the searched subspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResidualSizes:
    """Lengths in the residual of Ritz vectors, float64: ``wanted`` (b,) of the first k columns together, ``others`` (b,
    p - k) of each that follows, ``total`` (b,), ``coupling`` (b, p - k) of each row of Z2ᵀ R1; ``rows`` is n."""

    rows: int
    wanted: Tensor
    others: Tensor
    total: Tensor
    coupling: Tensor


def residual_sizes(residual: Tensor, coupling: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of :class:`ResidualSizes`, where the residual is.

    Args:
        residual: ``C Z - Z theta``, (b, n, p).
        coupling: ``Z2ᵀ R1``, (b, p - k, k): what rounding leaves of an exact zero.
        k: 1 <= k <= p.
    """
    others, rows = residual[..., k:].double().norm(dim=-2), coupling.double().norm(dim=-1)
    return _length(residual[..., :k]), others, _length(residual), rows


def ritz_bound(
    theta: Tensor, sizes: ResidualSizes, outside: Tensor, noise: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Bounds for Rayleigh-Ritz approximations to the leading eigenspace of a symmetric ``C``.

    Let Z = [Z1 Z2] be the Ritz vectors (k and p - k of them), Z3 the rest of the space, and X1, X2, X3 the blocks of
    the true leading eigenspace. Rows 2 and 3 of the eigen-equation are Sylvester equations with separated spectra:

        |X3| <= (|R1| + |R2ᵀ X2|) / (theta_k - outside)        outside >= |Z3ᵀ C Z3|
        |X2| <= |D (R2ᵀ X3 + H)|                                D = 1/(theta_k - theta_i), H = Z2ᵀ C Z1

    because the true eigenvalues lie above their Ritz values. Solving the pair for sqrt(|X2|² + |X3|²) gives a bound
    in which the small gap at the cut divides a product of residuals only (compare Nakatsukasa, Linear Algebra
    Appl. 593, 2020). Norms are Frobenius ones, except of factors known as matrices.

    Args:
        theta: Ritz values (b, p), descending.
        sizes: of the residual ``C Z - Z theta``.
        outside: upper bound on the largest eigenvalue of C on the complement of Z, (b,).
        noise: bound on the length of a residual's own rounding error, (b,).
        k: 1 <= k <= p.

    Returns:
        The bound for Z1, and the bound on the distance of the true leading eigenspace from the span of Z alone, which
        asks for no gap at the cut; (b,) float64 each, infinite where nothing is certified.
    """
    theta = theta.double()
    noise = noise.double()
    wanted = sizes.wanted + noise
    far = theta[:, k - 1] - outside.double() - noise
    alone = _finite_or_infinite(torch.where(far > 0, wanted / far, torch.full_like(far, math.inf)))
    if theta.shape[-1] == k:
        return alone, alone
    near = theta[:, k - 1, None] - theta[:, k:] - noise[:, None]
    separated = (near > 0).all(-1) & (far > 0)
    weight = torch.where(near > 0, 1 / near.clamp_min(1e-300), torch.zeros_like(near))
    lengths = sizes.others + noise[:, None]
    spread = (lengths * weight).square().sum(-1).sqrt()
    feedback = (lengths.square() * weight).sum(-1)
    rounding = noise[:, None] / math.sqrt(sizes.rows)
    mixed = (sizes.coupling + rounding) * weight
    mixing = mixed.norm(dim=-1)
    # |X2| <= spread |X3| + mixing, and far |X3| <= wanted + feedback |X3| + sum_i |r_i| |h_i| / (theta_k - theta_i)
    remaining = far - feedback
    x3 = (wanted + (lengths * mixed).sum(-1)) / remaining
    x2 = spread * x3 + mixing
    bound = torch.where(
        separated & (remaining > 0), (x2.square() + x3.square()).sqrt(), torch.full_like(x3, math.inf)
    )
    return _finite_or_infinite(bound), alone


def perturbation_bound(sigma: Tensor, k: int, error: Tensor, *, whole: bool) -> Tensor:
    """Wedin's bound for a decomposition that is exact for a matrix ``error`` away (spectral norm).

    Args:
        sigma: all computed singular values (b, r), descending.
        k: columns kept, 1 <= k <= r.
        error: (b,), at least the spectral norm of the backward error.
        whole: the k columns span all of both spaces (k = m = n), where the angle is zero by definition.
    """
    sigma = sigma.double()
    if whole:
        return torch.zeros_like(error, dtype=torch.float64)
    below = sigma[:, k] if sigma.shape[-1] > k else torch.zeros_like(sigma[:, 0])
    gap = sigma[:, k - 1] - below - 2 * error.double()
    return _finite_or_infinite(torch.where(gap > 0, error.double() / gap, torch.full_like(gap, math.inf)))


def _length(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix of a batch, float64."""
    return x.double().square().sum(dim=(-2, -1)).sqrt()


def _finite_or_infinite(bound: Tensor) -> Tensor:
    return torch.where(torch.isfinite(bound) & (bound < 1), bound, torch.full_like(bound, math.inf))
