"""Updates as operators: every kind gives the products, norms and counts of the E that it stands for."""

from __future__ import annotations

import sys

import pytest
import torch
from spectra_toys import flat_at_the_cut, random_update, stacked

from rlspec.perturb.delta import Delta, DenseDelta, LowRankDelta, PairDelta
from rlspec.spectra.delta import measure_delta
from rlspec.spectra.exact import measure_exact

F64 = torch.float64


def low_rank(dtype: torch.dtype = F64) -> tuple[LowRankDelta, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 40, 30, generator=g)
    b, a = (torch.randn(*shape, generator=g, dtype=F64) * 0.05 for shape in ((3, 40, 4), (3, 4, 30)))
    return LowRankDelta(b.to(dtype), a.to(dtype), 2.0, reference), 2.0 * b @ a


def every_kind() -> list[tuple[Delta, torch.Tensor]]:
    """Updates, and the float64 E that each is."""
    factors, e = low_rank()
    tuned = (factors.reference.double() + e).to(torch.bfloat16)
    base = factors.reference.to(torch.bfloat16)
    stored = tuned.double() - base.double()
    pair = PairDelta(tuned, base)
    return [(factors, e), (DenseDelta.between(tuned, base), stored), (pair, stored), (pair.to(F64), stored)]


@pytest.mark.parametrize("case", range(4))
def test_products_norms_and_counts_are_those_of_the_update(case: int):
    delta, e = every_kind()[case]
    tolerance = 1e-13 if delta.dtype == F64 else 1e-6
    x, y = torch.randn(3, 30, 7, dtype=delta.dtype), torch.randn(3, 40, 7, dtype=delta.dtype)
    for found, truth in (
        (delta.matmul(x), e @ x.double()),
        (delta.rmatmul(y), e.mT @ y.double()),
        (delta.dense(), e),
    ):
        assert found.dtype == delta.dtype
        assert float((found.double() - truth).norm() / truth.norm()) < tolerance
    weight = delta.weight()
    reference = weight - e
    assert weight.dtype == F64
    stats = delta.stats
    unchanged = e.abs() <= 1e-3 * torch.maximum(weight.abs(), reference.abs())
    for value, expected in (
        (stats.delta_frobenius, torch.linalg.matrix_norm(e)),
        (stats.weight_frobenius, torch.linalg.matrix_norm(weight)),
        (stats.reference_frobenius, torch.linalg.matrix_norm(reference)),
        (stats.sparsity, unchanged.double().mean((-2, -1))),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)
    assert delta.shape == (3, 40, 30)
    chosen = delta.select([2, 0])
    torch.testing.assert_close(chosen.dense(), delta.dense()[[2, 0]])
    torch.testing.assert_close(chosen.stats.sparsity, stats.sparsity[[2, 0]])
    assert delta.select([0, 1, 2]) is delta


def test_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch):
    """Counting and multiplying an update that is not stored does not depend on how many rows are formed at once."""
    import rlspec.perturb.delta as module

    for case in (0, 2):
        whole, e = every_kind()[case]
        monkeypatch.setattr(module, "_BLOCK", 3 * 30 * 7)
        monkeypatch.setattr(sys.modules["rlspec.ops.delta_matmul"], "_BLOCK", 100)
        parts, _ = every_kind()[case]
        x, y = torch.randn(3, 30, 7).to(whole.dtype), torch.randn(3, 40, 7).to(whole.dtype)
        torch.testing.assert_close(parts.matmul(x), whole.matmul(x))
        assert float((parts.rmatmul(y) - e.mT @ y.double()).norm() / (e.mT @ y.double()).norm()) < 1e-6
        for name in ("delta_frobenius", "weight_frobenius", "sparsity"):
            torch.testing.assert_close(getattr(parts.stats, name), getattr(whole.stats, name))


def test_engines_measure_an_update_however_it_is_given():
    """A low-rank, a dense and a paired update of the same weights have the same spectra, within the bounds told."""
    factors, e = low_rank()
    reference = stacked(list(factors.reference.double()))
    tuned = factors.reference.double() + e
    truth = measure_exact(reference, DenseDelta.between(tuned, reference.W))
    alone = DenseDelta.alone(e, reference.W, torch.linalg.matrix_norm(reference.W))
    kinds: list[Delta] = [
        LowRankDelta(factors.B, factors.A, factors.scale, reference.W),
        PairDelta(tuned, reference.W, F64),
        alone,
    ]
    for delta in kinds:
        for engine in (measure_delta, measure_exact):
            found = engine(reference, delta)
            bound = found.sigma_error_bound + truth.sigma_error_bound
            assert bool(((found.sigma - truth.sigma).abs().amax(-1) <= bound).all())
            for mine, exact in ((found.sines_left, truth.sines_left), (found.sines_right, truth.sines_right)):
                assert mine is not None and exact is not None
                angle = (mine.asin() - exact.asin()).abs().amax(-1)
                assert bool((angle <= found.angle_error_bound_rad + truth.angle_error_bound_rad).all())


def test_norms_stay_with_their_matrices_where_a_stack_is_measured_in_parts():
    """The first update is no perturbation and goes to the exact engine, the second to the other."""
    g = torch.Generator().manual_seed(0)
    weights = [flat_at_the_cut(30, 20, g) for _ in range(2)]
    reference = stacked(weights)
    e = torch.stack([random_update(weights[0], 0.9, None, g), random_update(weights[1], 1e-3, None, g)])
    found = measure_delta(reference, DenseDelta.between(reference.W + e, reference.W))
    assert found.engine == ("exact", "delta")
    for i in range(2):
        assert float(found.update.delta_frobenius[i]) == pytest.approx(float(e[i].norm()), rel=1e-9)
