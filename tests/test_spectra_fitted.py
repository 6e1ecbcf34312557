"""Accuracy on spectra fitted to a real model's q, k and v, which need no weights: flat at the cut, as those are."""

from __future__ import annotations

import pytest
import shapes
import torch
from shapes import fitted_spectrum
from spectra_toys import by_delta, by_exact

import rlspec
from rlspec.linalg.factor import reference_factors
from rlspec.linalg.rank import Rank
from rlspec.perturb.matrix import matrix_basis
from rlspec.perturb.reference import Reference

F64 = torch.float64
# eps -> relative errors of the restored weight, the singular values and the angle spectrum; the worst angle, rad
TARGETS = {
    1e-3: (0.01, 1e-6, 1e-3, 1e-3),
    1e-2: (0.01, 1e-6, 1e-3, 1e-3),
    5e-2: (0.03, 1e-5, 1e-3, 1e-3),
    0.2: (0.1, 1e-4, 1e-2, 1e-2),
}


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize(("projection", "m"), [("q", 192), ("k", 96), ("v", 96)])
def test_tracking_and_restoring_meet_their_targets(projection: str, m: int, rank: int | None) -> None:
    g = torch.Generator().manual_seed(3)
    n = 192
    s = fitted_spectrum(projection, m)
    u, v = (torch.linalg.qr(torch.randn(size, m, dtype=F64, generator=g)).Q for size in (m, n))
    base = ((u * s) @ v.T).bfloat16()
    factors = tuple(x.to(t) for x, t in zip(reference_factors(base), (torch.float32, F64, torch.float32)))
    basis = matrix_basis("w", base, factors, Rank.parse(0.2))
    reference, k = Reference.of([basis]), basis.k
    ub, _, vb = torch.linalg.svd(base.double(), full_matrices=False)
    for eps, (restored_target, sigma_target, spectrum_target, angle_target) in TARGETS.items():
        e = torch.randn(m, rank or n, generator=g)
        e = e if rank is None else e @ torch.randn(rank, n, generator=g)
        tuned = base.float() + eps * base.float().norm() / e.norm() * e
        found, truth = by_delta(reference, tuned[None]), by_exact(reference, tuned[None])
        assert found.engine == ("delta",) or eps > 0.1  # where the exact engine may take over
        assert float(((found.sigma - truth.sigma).abs() / truth.sigma).max()) <= sigma_target
        for mine, exact in ((found.sines_left, truth.sines_left), (found.sines_right, truth.sines_right)):
            assert mine is not None and exact is not None
            angle = (mine.asin() - exact.asin()).abs()
            assert float(angle.norm() / exact.asin().norm()) <= spectrum_target
            assert float(angle.max()) <= min(float(found.angle_error_bound_rad), angle_target)
        ut, st, vt = torch.linalg.svd(tuned.double(), full_matrices=False)
        change = (ub[:, :k] * st[:k]) @ vb[:k] - (ut[:, :k] * st[:k]) @ vt[:k]
        restored = rlspec.restore_matrix(base, tuned, 0.2, basis=basis, dtype=F64)
        assert float((restored.weight - tuned.double() - change).norm() / change.norm()) <= restored_target


@pytest.mark.parametrize("projection", ["q", "k", "v"])
def test_the_fitted_spectrum_is_that_of_the_weights(projection: str) -> None:
    fitted = fitted_spectrum(projection, 576)
    assert bool((fitted[1:] < fitted[:-1]).all()) and float(fitted[-1]) > 0
    assert float(1 - fitted[115] / fitted[114]) < 0.01  # flat at the cut
    measured = shapes.measured_quantiles(projection)
    if measured is not None:
        assert shapes._QUANTILES[projection] == pytest.approx(measured, rel=6e-4, abs=1e-4)
