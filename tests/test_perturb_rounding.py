"""Products that lose to one side, as tensor cores do where all terms have one sign: residuals have the same loss and do
not show it, so bounds count it by what the device's products round to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from spectra_toys import flat_at_the_cut, stacked
from torch import Tensor

from rlspec.perturb import bounds
from rlspec.perturb import delta as perturb_delta
from rlspec.perturb.delta import PairDelta
from rlspec.spectra import delta as spectra_delta
from rlspec.spectra.delta import measure_delta

PRODUCT_EPS = 2.0**-20  # of NVIDIA's tensor cores
LOSS = 0.75 * PRODUCT_EPS


def weights() -> tuple[Tensor, Tensor]:
    """W_ref and W, (160, 128) float32: the update is along the first singular vectors alone."""
    base = flat_at_the_cut(160, 128, torch.Generator().manual_seed(0)).float()
    u, s, vh = torch.linalg.svd(base.double())
    return base, (base.double() + 1e-3 * s.norm() * u[:, :1] @ vh[:1]).float()


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product with E is too small by `LOSS`."""

    def short(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: product(*given) * (1.0 - LOSS)

    for name in ("delta_matmul", "delta_rmatmul"):
        monkeypatch.setattr(perturb_delta, name, short(getattr(perturb_delta, name)))


@pytest.mark.usefixtures("lossy")
def test_values_and_angles_are_within_bounds_that_count_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base, now = weights()
    reference, delta = stacked([base], dtype=torch.float32), PairDelta(now[None], base[None])
    truth = torch.linalg.svdvals(now.double())[: reference.k]

    def measured() -> tuple[float, float]:
        """The largest error of a value over its bound, and the bound of angles."""
        found = measure_delta(reference, delta)
        assert found.engine == ("delta",)
        error = (found.sigma[0] - truth).abs().max()
        return float(error / found.sigma_error_bound[0]), float(found.angle_error_bound_rad[0])

    share, narrow = measured()
    assert share > 1.0  # float32's own rounding does not cover it
    for module in (bounds, spectra_delta):
        monkeypatch.setattr(module, "product_eps", lambda device, dtype: PRODUCT_EPS)
    share, wide = measured()
    assert share <= 1.0 and wide > narrow


def test_a_cpu_counts_what_float32_rounds_to(monkeypatch: pytest.MonkeyPatch) -> None:
    base, now = weights()
    reference, delta = stacked([base], dtype=torch.float32), PairDelta(now[None], base[None])
    found = measure_delta(reference, delta)
    for module in (bounds, spectra_delta):
        monkeypatch.setattr(module, "product_eps", lambda device, dtype: torch.finfo(dtype).eps)
    plain = measure_delta(reference, delta)
    assert torch.equal(found.sigma_error_bound, plain.sigma_error_bound)
    assert torch.equal(found.angle_error_bound_rad, plain.angle_error_bound_rad)
