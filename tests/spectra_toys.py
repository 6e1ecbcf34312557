"""Stacks of references for the spectral engines, and how far one measurement is from another."""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.linalg.factor import reference_factors
from rlspec.linalg.rank import Rank, RankLike
from rlspec.perturb.delta import DenseDelta
from rlspec.perturb.matrix import matrix_basis
from rlspec.perturb.reference import Reference
from rlspec.spectra.delta import measure_delta
from rlspec.spectra.exact import measure_exact
from rlspec.spectra.measurement import Measurement

F64 = torch.float64


def flat_at_the_cut(m: int, n: int, generator: torch.Generator) -> Tensor:
    """A matrix with a spectrum like an attention projection's: a few large values, then hardly any gaps."""
    r = min(m, n)
    u = torch.linalg.qr(torch.randn(m, r, dtype=F64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, r, dtype=F64, generator=generator)).Q
    x = torch.arange(r, dtype=F64) / r
    s = 3.0 * torch.exp(-4.0 * x.sqrt()) + 1.0 - 0.95 * x**1.2
    s = (s * (1.0 + 0.01 * torch.rand(r, dtype=F64, generator=generator))).sort(descending=True).values
    return (u * s) @ v.T


def random_update(weight: Tensor, eps: float, rank: int | None, generator: torch.Generator) -> Tensor:
    """An update of relative size ``eps``: Gaussian, or of that rank."""
    m, n = weight.shape
    if rank is None:
        e = torch.randn(m, n, dtype=F64, generator=generator)
    else:
        a, b = (
            torch.randn(m, rank, dtype=F64, generator=generator),
            torch.randn(rank, n, dtype=F64, generator=generator),
        )
        e = a @ b
    return e * (eps * weight.norm() / e.norm())


def stacked(weights: list[Tensor], rank: RankLike = 0.2, dtype: torch.dtype = F64) -> Reference:
    """References with factors in ``dtype``."""
    matrices = []
    for i, weight in enumerate(weights):
        u, s, vh = reference_factors(weight)
        matrices.append(matrix_basis(str(i), weight, (u.to(dtype), s, vh.to(dtype)), Rank.parse(rank)))
    return Reference.of(matrices)


def by_delta(reference: Reference, weight: Tensor) -> Measurement:
    """The delta engine on a stack of weights (L, m, n)."""
    return measure_delta(reference, DenseDelta.between(weight, reference.W))


def by_exact(reference: Reference, weight: Tensor) -> Measurement:
    """The exact engine likewise."""
    return measure_exact(reference, DenseDelta.between(weight, reference.W))


def errors(found: Measurement, truth: Measurement) -> tuple[Tensor, Tensor, float]:
    """(L,) worst error of a singular value, of an angle; and the relative Frobenius error of the sines."""
    sigma = (found.sigma - truth.sigma).abs().amax(-1)
    angle, frobenius = torch.zeros_like(sigma), 0.0
    for mine, exact in ((found.sines_left, truth.sines_left), (found.sines_right, truth.sines_right)):
        assert (mine is None) == (exact is None)
        if mine is not None and exact is not None:
            angle = torch.maximum(angle, (mine.asin() - exact.asin()).abs().amax(-1))
            frobenius = max(frobenius, float(((mine - exact).norm(dim=-1) / exact.norm(dim=-1)).max()))
    return sigma, angle, frobenius
