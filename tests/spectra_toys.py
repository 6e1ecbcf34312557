"""Stacks of references for the spectral engines, and how far one measurement is from another."""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.spectra.factor import reference_factors
from rlspec.spectra.matrix import matrix_basis
from rlspec.spectra.measurement import Measurement, ReferenceStack
from rlspec.spectra.rank import Rank, RankLike

F64 = torch.float64


def stacked(weights: list[Tensor], rank: RankLike = 0.2, dtype: torch.dtype = F64) -> ReferenceStack:
    """References with factors in ``dtype``."""
    matrices = []
    for i, weight in enumerate(weights):
        u, s, vh = reference_factors(weight)
        matrices.append(matrix_basis(str(i), weight, (u.to(dtype), s, vh.to(dtype)), Rank.parse(rank)))
    return ReferenceStack.of(matrices)


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
