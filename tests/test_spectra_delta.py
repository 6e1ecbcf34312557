"""The delta engine against the exact engine: values, angles, and bounds that hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from spectra_toys import F64, by_delta, by_exact, errors, flat_at_the_cut, random_update, stacked

from rlspec.perturb.delta import DenseDelta
from rlspec.perturb.norms import krylov_moments, spectral_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(96, 96), (48, 128), (128, 48)])
@pytest.mark.parametrize("rank", [None, 4])
def test_agrees_with_the_exact_engine(shape, rank, dtype):
    g = torch.Generator().manual_seed(0)
    weights = [flat_at_the_cut(*shape, g) for _ in range(3)]
    reference, exact_reference = stacked(weights, dtype=dtype), stacked(weights)
    for eps, sigma_tolerance in ((1e-4, 1e-6), (1e-3, 1e-6), (1e-2, 1e-6), (5e-2, 1e-5)):
        tuned = torch.stack([w + random_update(w, eps, rank, g) for w in weights])
        found, truth = by_delta(reference, tuned), by_exact(exact_reference, tuned)
        sigma, angle, frobenius = errors(found, truth)
        assert float((sigma / truth.sigma[:, -1]).max()) <= sigma_tolerance
        assert frobenius <= 1e-3
        assert bool((sigma <= found.sigma_error_bound).all())
        assert bool((angle <= found.angle_error_bound_rad).all())
        torch.testing.assert_close(
            found.core, truth.core, rtol=1e-4, atol=1e-6 * float(truth.core.abs().max())
        )
        torch.testing.assert_close(found.best_cosine, truth.best_cosine, rtol=0, atol=2e-3)
        assert bool(
            ((found.effective_rank - truth.effective_rank).abs() <= found.effective_rank_error_bound).all()
        )
        torch.testing.assert_close(found.delta_spectral, truth.delta_spectral, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(48, 48), (40, 96), (96, 40)])
def test_best_matches_agree_with_the_exact_engine(shape, dtype):
    """Where values lie apart. Vectors of close ones are anybody's choice within their span."""
    g = torch.Generator().manual_seed(3)
    r = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, r, dtype=F64, generator=g)).Q for n in shape)
    s = torch.cat([torch.linspace(4.0, 2.0, 8, dtype=F64), torch.linspace(1.0, 0.1, r - 8, dtype=F64)])
    weight = (u * s) @ v.T
    reference, exact_reference = stacked([weight], rank=8, dtype=dtype), stacked([weight], rank=8)
    for eps in (1e-4, 1e-3, 1e-2, 1e-1):
        tuned = (weight + random_update(weight, eps, None, g))[None]
        found, truth = by_delta(reference, tuned), by_exact(exact_reference, tuned)
        for mine, exact in (
            (found.best_match_left, truth.best_match_left),
            (found.best_match_right, truth.best_match_right),
        ):
            assert float(exact.min()) < 1.0
            torch.testing.assert_close(1.0 - mine, 1.0 - exact, rtol=1e-3, atol=2e-14)


def test_small_updates_stay_in_the_delta_form_and_large_ones_leave_it():
    g = torch.Generator().manual_seed(1)
    weights = [flat_at_the_cut(64, 64, g) for _ in range(2)]
    reference = stacked(weights)
    tuned = torch.stack([weights[0] + random_update(weights[0], 1e-2, None, g), -weights[1]])
    found = by_delta(reference, tuned)
    assert found.engine == ("delta", "exact")
    assert found.notes[0] is None and "full decomposition" in found.notes[1]
    truth = by_exact(reference, tuned)
    torch.testing.assert_close(found.sines_left[1], truth.sines_left[1])


def test_a_full_decomposition_is_taken_of_the_weight_only(monkeypatch):
    """The norm of the update comes from a few products, as in every other row of the engine."""
    from rlspec.spectra import exact

    g = torch.Generator().manual_seed(1)
    weight = flat_at_the_cut(64, 48, g)
    tuned = weight + random_update(weight, 2.0, None, g)
    truth = torch.linalg.svdvals(tuned - weight)[0]
    taken = []
    for solver in ("thin_svd", "lapack_values"):
        real = getattr(exact, solver)
        monkeypatch.setattr(exact, solver, lambda a, real=real: taken.append(a) or real(a))
    found = by_delta(stacked([weight]), tuned[None])
    assert found.engine == ("exact",) and [tuple(a.shape) for a in taken] == [(1, 64, 48)]
    assert float(found.delta_spectral / truth) == pytest.approx(1.0, abs=0.02)


def test_a_bound_notices_a_wrong_answer():
    """The broken twin: a pair whose rotation was dropped must get bounds that cover the error it makes."""
    from rlspec.perturb.bounds import residual_bounds
    from rlspec.perturb.coordinates import Pair, Side, beyond, diagonalise, sines
    from rlspec.perturb.first_order import first_order
    from rlspec.perturb.residual import residual

    g = torch.Generator().manual_seed(3)
    weights = [flat_at_the_cut(64, 64, g)]
    reference = stacked(weights)
    tuned = torch.stack([weights[0] + random_update(weights[0], 1e-2, None, g)])
    delta = DenseDelta.between(tuned, reference.W)
    left, right, core, grams, _ = first_order(reference, delta)
    good = diagonalise(left, right, core, grams)
    still = (
        Side(left.lead, torch.zeros_like(left.tail), None),
        Side(right.lead, torch.zeros_like(right.tail), None),
    )
    eye = torch.eye(core.shape[-1], dtype=F64).unsqueeze(0)
    bad = diagonalise(*still, core, (eye, eye))
    truth = by_exact(reference, tuned)

    def angle_bound(pair: Pair) -> torch.Tensor:
        left_over, scale = residual(reference, delta, pair), delta.stats.delta_frobenius
        return residual_bounds(reference, left_over, scale, torch.zeros_like(scale), F64).angle

    wrong = (sines(beyond(bad.left, reference.k), reference.k).asin() - truth.sines_left.asin()).abs().max()
    assert wrong > 3 * angle_bound(good)
    assert wrong <= angle_bound(bad)


def test_unchanged_matrix_among_changed_ones_is_exactly_zero():
    g = torch.Generator().manual_seed(4)
    weights = [flat_at_the_cut(40, 40, g) for _ in range(3)]
    tuned = torch.stack([weights[0] + 0.01, weights[1], weights[2] - 0.01])
    found = by_delta(stacked(weights), tuned)
    assert float(found.sines_left[1].abs().max()) == 0.0
    assert float(found.sigma_error_bound[1]) == 0.0 == float(found.angle_error_bound_rad[1])
    assert bool((found.sines_left[[0, 2], 0] > 0).all())


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (3, 3), (12, 5)])
@pytest.mark.parametrize("rank", [1, 0.5, 1.0])
def test_tiny_matrices(shape, rank):
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(*shape, dtype=F64, generator=g) for _ in range(2)]
    reference = stacked(weights, rank=rank)
    tuned = torch.stack([w + random_update(w, 1e-3, None, g) for w in weights])
    found, truth = by_delta(reference, tuned), by_exact(reference, tuned)
    sigma, angle, _ = errors(found, truth)
    assert bool((sigma <= found.sigma_error_bound).all())
    assert bool((angle <= found.angle_error_bound_rad).all())


def test_rank_deficient_reference_and_repeated_values():
    g = torch.Generator().manual_seed(6)
    low = torch.randn(40, 6, dtype=F64, generator=g) @ torch.randn(6, 30, dtype=F64, generator=g)
    q = torch.linalg.qr(torch.randn(32, 32, dtype=F64, generator=g)).Q
    for weight in (low, q):  # q: every singular value is 1, no gap anywhere
        reference = stacked([weight], rank=0.25)
        tuned = (weight + random_update(weight, 1e-3, None, g)).unsqueeze(0)
        found = by_delta(reference, tuned)
        truth = by_exact(reference, tuned)
        sigma, angle, _ = errors(found, truth)
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if isinstance(value, torch.Tensor):
                assert bool(torch.isfinite(value).all()), field.name
        assert bool((sigma <= found.sigma_error_bound).all())
        both = found.angle_error_bound_rad + truth.angle_error_bound_rad
        assert bool((angle <= both).all())


def test_spectral_norm_of_flat_and_low_rank_matrices():
    def norm(a: torch.Tensor) -> torch.Tensor:
        return spectral_norm(*krylov_moments(DenseDelta.alone(a, torch.zeros_like(a), torch.zeros(len(a)))))

    g = torch.Generator().manual_seed(7)
    thin = torch.randn(2, 90, 3, generator=g) @ torch.randn(2, 3, 70, generator=g)
    decaying = torch.randn(1, 90, 70, generator=g) * 0.5 ** torch.arange(70)
    full = [torch.randn(2, 90, 70, dtype=F64, generator=g), torch.randn(2, 5, 70, dtype=F64, generator=g)]
    for a in (*full, thin, decaying, 1e-12 * full[0]):
        torch.testing.assert_close(norm(a), torch.linalg.matrix_norm(a.double(), ord=2), rtol=0.02, atol=0)
    assert float(norm(torch.zeros(1, 8, 8)).item()) == 0.0
