"""Closed-form spectral metrics, batched over matrices of one shape.

Axes: ``L`` matrices, ``m`` by ``n`` each, ``r = min(m, n)``, ``k`` leading directions. Where a definition
divides by the norm of an update or a weight, a zero divided by that zero norm is zero: an unchanged matrix
has measured zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient of non-negative tensors with 0 where the denominator is 0."""
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0, numerator / safe, torch.zeros_like(numerator))


def normalised_spectral_shift(sigma: Tensor, sigma_ref: Tensor) -> Tensor:
    """NSS_k = ||σ - σ_ref|| / ||σ_ref|| over the k values given (arXiv 2511.08567). (..., k) -> (...)."""
    return ratio((sigma - sigma_ref).norm(dim=-1), sigma_ref.norm(dim=-1))


def relative_changes(sigma: Tensor, sigma_ref: Tensor) -> Tensor:
    """|σ_i - σ_ref,i| / σ_ref,i, shape (..., k)."""
    return ratio((sigma - sigma_ref).abs(), sigma_ref)


def stable_rank(frobenius_norm: Tensor, spectral_norm: Tensor) -> Tensor:
    """||A||²_F / ||A||²_2, 0 for a zero matrix."""
    return ratio(frobenius_norm.square(), spectral_norm.square())


def effective_rank(sigma: Tensor) -> Tensor:
    """exp of the Shannon entropy of p = σ/Σσ over the last axis (Roy and Vetterli, 2007). (..., r) ->
    (...)."""
    p = ratio(sigma, sigma.sum(-1, keepdim=True).expand_as(sigma))
    total = torch.special.entr(p).sum(-1).exp()
    return torch.where(sigma.sum(-1) > 0, total, torch.zeros_like(total))


def effective_rank_bound(sigma: Tensor, error: Tensor) -> Tensor:
    """How far the effective rank can be off, to first order, when ||σ - σ_true||_2 <= ``error`` (shape
    (...)).

    With H the entropy and T = Σσ, dH/dσ_i = -(log p_i + H)/T, so the rank moves by at most
    exp(H) * ||log p + H||_2 / T * error. Values that are smaller than their part of the error count as that.
    """
    total = sigma.sum(-1, keepdim=True)
    p = ratio(sigma, total.expand_as(sigma))
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    least = ratio(error, total.squeeze(-1)).unsqueeze(-1) / sigma.shape[-1]
    part = torch.maximum(p, least)
    slope = torch.where(part > 0, part.clamp_min(1e-300).log() + entropy, torch.zeros_like(p)).norm(dim=-1)
    return ratio(entropy.squeeze(-1).exp() * slope * error, total.squeeze(-1))


def projected_energy(core: Tensor, delta_frobenius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ρ_k and the diagonal and off-diagonal energy shares of ``core`` = U_kᵀ ΔW V_k.

    Args:
        core: (L, k, k).
        delta_frobenius: (L,) ||ΔW||_F.

    Returns:
        ρ_k = ||core||_F / ||ΔW||_F (arXiv 2510.13003), then Σ_i core_ii² / ||ΔW||²_F (changes singular
        values) and the rest of ||core||²_F / ||ΔW||²_F (rotates); each (L,) float64.
    """
    core = core.double()
    squares = core.square()
    diagonal = squares.diagonal(dim1=-2, dim2=-1).sum(-1)
    # Summed on its own: the difference of two totals would leave rounding noise for a small rest.
    off = (squares - torch.diag_embed(squares.diagonal(dim1=-2, dim2=-1))).sum((-2, -1))
    total = delta_frobenius.square()
    return ratio((diagonal + off).sqrt(), delta_frobenius), ratio(diagonal, total), ratio(off, total)


def best_match(coordinates: Tensor) -> Tensor:
    """Largest |cosine| of each leading reference vector with any of the leading current vectors.

    Args:
        coordinates: (L, k, k) U_ref,kᵀ U_k, or the same of the right side.

    Returns:
        (L, k), one for each reference vector; it may exceed one by rounding.
    """
    return torch.linalg.vector_norm(coordinates, ord=math.inf, dim=-1)


def intruders(
    best_cosine: Tensor, sigma: Tensor, weight_frobenius: Tensor, *, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Intruder dimensions (arXiv 2410.21228): leading left vectors unlike every reference vector.

    Args:
        best_cosine: (L, k) largest |cosine| of each current leading left vector with all reference left
        vectors. sigma: (L, k) current singular values.
        weight_frobenius: (L,).

    Returns:
        Their number (L,) int64 and the share of ||W||²_F that they carry (L,) float64.
    """
    found = best_cosine < threshold
    return found.sum(-1), ratio((sigma.square() * found).sum(-1), weight_frobenius.square())


def arcsine_error(sine: Tensor, error: Tensor | float) -> Tensor:
    """How far asin(s) can be off, radians, for sines s in [0, 1] known to within ``error``; same shape, float64.

    Near π/2 that is far more than ``error``, up to sqrt(2 error): the sine hardly changes there.
    """
    sine = sine.double()
    return torch.asin((sine + error).clamp_max(1.0)) - torch.asin((sine - error).clamp(0.0, 1.0))


def arcsine_rounding(sines: Iterable[Tensor | None], eps: float) -> Tensor | float:
    """(L,) radians lost by taking angles from sines, of factors and products that round to ``eps``.

    The more, the nearer to π/2, and an angle gets there under the smallest update where the k-th value and the next
    change places.

    Args:
        sines: (L, k) descending, of each side; None for a side without angles.
    """
    rounding = 2.0 * eps + 8.0 * torch.finfo(torch.float64).eps
    # A column's rounding is relative to all of it, and so to all the sines.
    lost = [
        arcsine_error(s[..., 0], rounding * s.norm(dim=-1).clamp_max(1.0)) for s in sines if s is not None
    ]
    return torch.stack(lost).amax(0) if lost else 0.0


def angle_statistics(sines: Tensor) -> dict[str, Tensor]:
    """Maximum, mean and root mean square of the angles (radians) and the projector distance.

    The projector distance ||U Uᵀ - U' U'ᵀ||_F is sqrt(2) times the norm of the sines.

    Args:
        sines: (..., k).

    Returns:
        ``max_rad``, ``mean_rad``, ``rms_rad``, ``projector_distance``, each (...).
    """
    angles = torch.asin(sines.clamp(0.0, 1.0))
    return {
        "max_rad": angles.amax(-1),
        "mean_rad": angles.mean(-1),
        "rms_rad": angles.square().mean(-1).sqrt(),
        "projector_distance": 2.0**0.5 * sines.norm(dim=-1),
    }
