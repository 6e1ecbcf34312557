"""Each metric against its closed form on a case small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlspec.perturb.delta import DenseDelta
from rlspec.spectra import metrics

F64 = torch.float64


def test_update_statistics_and_sparsity():
    reference = torch.tensor([[[1.0, -2.0], [4.0, 0.0]]], dtype=F64)
    weight = torch.tensor([[[1.0005, -2.0], [4.4, 0.0]]], dtype=F64)
    found = DenseDelta.between(weight, reference).stats
    assert found.sparsity.item() == 0.75  # 1.0005 moved by less than 1e-3 of itself, 4.4 by more
    assert found.delta_frobenius.item() == pytest.approx(math.hypot(0.0005, 0.4), rel=1e-12)
    assert found.reference_frobenius.item() == pytest.approx(math.sqrt(21.0), rel=1e-15)


def test_difference_of_bfloat16_is_exact():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 64, 64).bfloat16()
    assert torch.equal(DenseDelta.between(a, b).values.double(), a.double() - b.double())


def test_unchanged_matrix_has_zeros_everywhere():
    w = torch.randn(2, 5, 7)
    found = DenseDelta.between(w, w).stats
    assert found.sparsity.tolist() == [1.0, 1.0]
    assert found.delta_frobenius.tolist() == [0.0, 0.0]
    for value in metrics.projected_energy(torch.zeros(2, 3, 3), found.delta_frobenius):
        assert value.tolist() == [0.0, 0.0]
    assert metrics.stable_rank(torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64)).item() == 0.0


def test_nss_and_relative_changes():
    ref = torch.tensor([3.0, 4.0], dtype=F64)
    now = torch.tensor([3.3, 3.6], dtype=F64)
    assert metrics.normalised_spectral_shift(now, ref).item() == pytest.approx(0.1, rel=1e-14)
    assert metrics.relative_changes(now, ref).tolist() == pytest.approx([0.1, 0.1], rel=1e-12)


def test_ranks_of_flat_and_single_spectra():
    flat = torch.full((6,), 2.0, dtype=F64)
    assert metrics.effective_rank(flat).item() == pytest.approx(6.0, rel=1e-14)
    one = torch.tensor([5.0, 0.0, 0.0], dtype=F64)
    assert metrics.effective_rank(one).item() == pytest.approx(1.0, rel=1e-14)
    assert metrics.effective_rank(torch.zeros(3, dtype=F64)).item() == 0.0
    assert metrics.stable_rank(flat.norm(), flat.max()).item() == pytest.approx(6.0, rel=1e-14)


def test_effective_rank_bound_covers_small_changes():
    torch.manual_seed(1)
    s = torch.rand(40, dtype=F64) + 0.5
    for _ in range(50):
        change = 1e-4 * torch.randn(40, dtype=F64)
        moved = (metrics.effective_rank(s + change) - metrics.effective_rank(s)).abs()
        bound = metrics.effective_rank_bound(s, change.norm())
        assert moved <= bound * 1.01  # second-order terms
    along = 1e-4 * torch.autograd.functional.jacobian(metrics.effective_rank, s)  # the steepest direction
    moved = (metrics.effective_rank(s + along) - metrics.effective_rank(s)).abs()
    assert moved >= 0.9 * metrics.effective_rank_bound(s, along.norm())


def test_projected_energy_splits_diagonal_and_rest():
    core = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=F64)
    rho, diagonal, off = metrics.projected_energy(core, torch.tensor([10.0], dtype=F64))
    assert (rho.item(), diagonal.item(), off.item()) == pytest.approx((0.5, 0.09, 0.16), rel=1e-14)


def test_diagonal_update_leaves_no_off_diagonal_energy():
    core = torch.diag_embed(torch.randn(1, 20, dtype=F64))
    _, diagonal, off = metrics.projected_energy(core, core.norm(dim=(-2, -1)))
    assert off.item() == 0.0
    assert diagonal.item() == pytest.approx(1.0, rel=1e-14)


def test_intruders_count_and_energy():
    best = torch.tensor([0.99, 0.3, 0.6], dtype=F64)
    number, energy = metrics.intruders(
        best, torch.tensor([2.0, 1.0, 0.5], dtype=F64), torch.tensor(4.0, dtype=F64)
    )
    assert number.item() == 1
    assert energy.item() == pytest.approx(1.0 / 16.0, rel=1e-14)


def test_angle_statistics_closed_form():
    sines = torch.tensor([0.3, 1e-6], dtype=F64).sin()
    found = metrics.angle_statistics(sines)
    assert float(found["max_rad"]) == pytest.approx(0.3, rel=1e-12)
    assert float(found["mean_rad"]) == pytest.approx(0.1500005, rel=1e-12)
    assert float(found["rms_rad"]) == pytest.approx(math.sqrt((0.09 + 1e-12) / 2), rel=1e-12)
    u = torch.tensor([[1.0], [0.0]], dtype=F64)
    w = torch.tensor([[math.cos(0.3)], [math.sin(0.3)]], dtype=F64)
    projectors = (u @ u.T - w @ w.T).norm().item()
    one = metrics.angle_statistics(torch.stack([sines[:1], sines[:1]]))
    assert one["projector_distance"].tolist() == pytest.approx([projectors] * 2, rel=1e-12)
