"""Reported subspace bounds contain the true error, every time, without being absurdly wide."""

from __future__ import annotations

import pytest
import torch

from rlspec.linalg.angles import principal_sines
from rlspec.linalg.estimates import ResidualSizes, perturbation_bound, residual_sizes, ritz_bound
from rlspec.linalg.svd import svd

TRIALS = 125  # of each of eight kinds: 1,000 in all


def random_spectra(kind: str, count: int, r: int, generator: torch.Generator) -> torch.Tensor:
    """Spectra (count, r), descending, of the named shape."""
    t = torch.linspace(0, 1, r, dtype=torch.float64)
    noise = torch.rand(count, r, dtype=torch.float64, generator=generator)
    if kind == "flat":
        s = 1.0 + noise
    elif kind == "decaying":
        s = torch.exp(-3.0 * t) * (0.7 + 0.3 * noise)
    elif kind == "outliers":
        s = 0.2 + noise
        s[:, :3] *= 12
    else:
        s = 1.5 - t + 0.02 * noise  # evenly spaced, as an attention weight's body
    return s.sort(dim=-1, descending=True)[0]


def planted(s: torch.Tensor, m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Matrices (count, m, n) with the singular values ``s`` (count, min(m, n)) and random vectors."""
    count, r = s.shape
    u = torch.linalg.qr(torch.randn(count, m, r, dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(count, n, r, dtype=torch.float64, generator=generator))[0]
    return (u * s.unsqueeze(-2)) @ v.mT


def true_error(a: torch.Tensor, u: torch.Tensor, vh: torch.Tensor) -> torch.Tensor:
    """Sine of the largest angle, left or right, of each computed leading subspace, against float64 LAPACK."""
    k = u.shape[-1]
    left, _, right = torch.linalg.svd(a.double(), full_matrices=False)
    return torch.maximum(
        principal_sines(left[..., :k], u)[..., 0], principal_sines(right[..., :k, :].mT, vh.mT)[..., 0]
    )


def test_randomized_bounds_contain_the_truth_in_a_thousand_trials() -> None:
    generator = torch.Generator().manual_seed(7)
    ratios, certified = [], 0
    for kind in ("flat", "decaying", "outliers", "even"):
        for m, n in ((80, 80), (72, 110)):
            a = planted(random_spectra(kind, TRIALS, min(m, n), generator), m, n, generator).float()
            found = svd(a, 16, method="randomized", tol=1e-2, generator=generator)
            truth = true_error(a, found.U, found.Vh)
            assert (found.subspace_bound >= truth).all(), (kind, m, n)
            finite = torch.isfinite(found.subspace_bound)
            ratios.append((found.subspace_bound / truth)[finite])
            certified += int(finite.sum())
    assert certified > 0.9 * 8 * TRIALS  # the rest have a cut too narrow for float32
    assert torch.cat(ratios).median() < 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_bounds_contain_the_truth(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    a = planted(random_spectra("flat", 200, 40, generator), 48, 40, generator).to(dtype)
    found = svd(a, 9, method="exact")
    truth = true_error(a, found.U, found.Vh)
    assert (found.subspace_bound >= truth).all()
    if dtype == torch.float32:  # float64 LAPACK is no truth for float64
        assert (found.subspace_bound / truth).median() < 30


def test_a_tie_at_the_cut_is_not_certified() -> None:
    s = torch.tensor([5.0, 4.0, 3.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    tied = torch.diag(s[[2, 0, 4, 3, 1, 5]]).float()  # random vectors would break the tie by rounding
    assert torch.isinf(svd(tied, 3).subspace_bound)
    assert svd(tied, 4).subspace_bound < 1e-6


def test_ritz_bound_on_a_known_rotation() -> None:
    """Ritz vectors turned by a known angle out of the searched space; a bound without the small gap would lie."""
    c = torch.diag(torch.tensor([4.0, 3.0, 2.9, 1.0, 0.5], dtype=torch.float64))
    turn = torch.eye(5, dtype=torch.float64)
    angle = torch.tensor(0.02, dtype=torch.float64)
    for i, j in ((1, 3), (2, 4), (2, 3)):
        plane = torch.eye(5, dtype=torch.float64)
        plane[i, i] = plane[j, j] = angle.cos()
        plane[i, j], plane[j, i] = -angle.sin(), angle.sin()
        turn = turn @ plane
    z = turn[:, :3]
    values, q = torch.linalg.eigh(z.T @ c @ z)
    z, theta = z @ q.flip(-1), values.flip(-1)
    residual = c @ z - z * theta
    outside = torch.linalg.eigvalsh(turn[:, 3:].T @ c @ turn[:, 3:]).max()
    coupling = z[:, 2:].T @ residual[:, :2]
    zero = torch.zeros(1, dtype=torch.float64)
    sizes = ResidualSizes(len(residual), *residual_sizes(residual[None], coupling[None], 2))
    bound, _ = ritz_bound(theta[None], sizes, outside[None], zero, 2)
    truth = principal_sines(torch.eye(5, dtype=torch.float64)[:, :2], z[:, :2])[0]
    assert truth <= bound < 3 * truth
    far_only = residual[:, :2].norm() / (theta[1] - outside)
    assert bound > far_only
    # Nothing is known once the rest of the spectrum may reach the cut.
    assert torch.isinf(ritz_bound(theta[None], sizes, theta[None, 1], zero, 2)[0])


def test_perturbation_bound_is_wedins() -> None:
    sigma = torch.tensor([[3.0, 2.0, 1.0]])
    error = torch.tensor([0.1], dtype=torch.float64)
    assert perturbation_bound(sigma, 2, error, whole=False).item() == pytest.approx(0.1 / 0.8)
    assert perturbation_bound(sigma, 3, error, whole=True).item() == 0
    assert torch.isinf(perturbation_bound(sigma, 2, error * 6, whole=False))
