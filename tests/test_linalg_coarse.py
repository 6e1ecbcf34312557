"""Products in bfloat16: as far off as their rounding, and nowhere that values, bounds or float64 depend on it."""

from __future__ import annotations

import pytest
import torch
from spectra_toys import F64, by_delta, random_update, stacked

from rlspec.errors import OptionError
from rlspec.linalg import coarse
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.perturb import first_order as first
from rlspec.perturb.coordinates import diagonalise
from rlspec.perturb.delta import DenseDelta
from rlspec.perturb.reference import Reference

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def test_products_are_those_of_rounded_factors() -> None:
    a, b, c = random(2, 96, 80), random(2, 80, 24, seed=1), random(2, 96, 24, seed=2)
    for found, left, right in (
        (coarse.coarse_matmul(a, b), a, b),
        (coarse.coarse_rmatmul(a, c), a.mT, c),
    ):
        assert found.dtype == torch.float32 and found.shape == (2, left.shape[1], 24)
        exact = left.bfloat16().double() @ right.bfloat16().double()
        assert relative(found, exact) < 2.0**-8  # the result is rounded, too
        assert 1e-4 < relative(found, left.double() @ right.double()) < 2.0**-7


def test_the_diagonal_of_a_cross_product_is_not_rounded() -> None:
    a, b = random(2, 300, 40), random(2, 300, 40, seed=1)
    found, truth = coarse.coarse_cross(a, b), a.double().mT @ b.double()
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert float((diagonal - truth.diagonal(dim1=-2, dim2=-1)).abs().max()) < 1e-4
    assert relative(found, truth) > 1e-4


@pytest.mark.parametrize(
    ("choice", "amx", "dtype", "entries", "refusal"),
    [
        ("auto", True, torch.float32, 1 << 22, None),
        ("auto", True, torch.float32, 1 << 21, "the matrices are small"),
        ("auto", True, F64, 1 << 20, "float64 is asked for"),
        ("auto", False, torch.float32, 1 << 22, "the CPU has no AMX"),
        ("bfloat16", False, torch.float32, 1 << 10, None),
        ("bfloat16", False, F64, 1 << 20, "float64 is asked for"),
        ("float32", True, torch.float32, 1 << 20, "RLSPEC_PRODUCTS=float32"),
    ],
)
def test_rounding_is_for_units_that_pay_and_for_who_asks(
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
    amx: bool,
    dtype: torch.dtype,
    entries: int,
    refusal: str | None,
) -> None:
    monkeypatch.setenv("RLSPEC_PRODUCTS", choice)
    monkeypatch.setattr(coarse, "cpu_capabilities", lambda: {"amx": amx})
    assert coarse.coarse_refusal(CPU, dtype, entries) == refusal
    assert coarse.coarse_refusal(torch.device("cuda"), dtype, entries) is not None


def test_an_unknown_choice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_PRODUCTS", "tf32")
    with pytest.raises(OptionError, match="RLSPEC_PRODUCTS=tf32: unknown products; valid: auto, float32, bf"):
        coarse.coarse_refusal(CPU, torch.float32)


@pytest.mark.parametrize("shape", [(120, 120), (100, 160), (160, 100)])
def test_float64_factors_are_never_rounded(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, dtype=F64, generator=g)
    tuned = (weight + random_update(weight, 1e-3, None, g))[None]
    found = []
    for choice in ("float32", "bfloat16"):
        monkeypatch.setenv("RLSPEC_PRODUCTS", choice)
        found.append(by_delta(stacked([weight], 0.2, F64), tuned))
    assert found[0].arithmetic == found[1].arithmetic == ("float64",)
    assert torch.equal(found[0].sigma, found[1].sigma)


def _largest_value_error(reference: Reference, tuned: torch.Tensor) -> float:
    with pinned_arithmetic():
        delta = DenseDelta.between(tuned, reference.W).to(torch.float32)
        left, right, core, grams, _ = first.first_order(reference, delta, coarse=True)
        sigma = diagonalise(left, right, core, grams, coarse=True).sigma[0, : reference.k]
    truth = torch.linalg.svdvals(tuned[0].double())[: reference.k]
    return float(((sigma - truth) / truth).abs().max())


def test_values_keep_float32_and_would_not_by_products_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(400, 400, dtype=F64, generator=g).float()
    tuned = (weight.double() + random_update(weight.double(), 1e-3, None, g)).float()[None]
    reference = stacked([weight], 0.2, torch.float32)
    good = _largest_value_error(reference, tuned)
    assert good < 3e-7
    # The twins: the diagonals of second order left rounded; E V1 rounded.
    with monkeypatch.context() as patch:
        patch.setattr(first, "coarse_cross", coarse.coarse_rmatmul)
        assert _largest_value_error(reference, tuned) > 2 * good
    rounded = DenseDelta.matmul
    monkeypatch.setattr(DenseDelta, "matmul", lambda self, x: rounded(self.to(torch.bfloat16), x))
    assert _largest_value_error(reference, tuned) > 2 * good
