"""Filters of ``rlspec.svd``: rounding that grows, rough products, and residuals that float32 cannot take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlspec.linalg import coarse, randomized
from rlspec.linalg.angles import principal_sines
from rlspec.linalg.chebyshev import filter_correction
from rlspec.linalg.coarse import coarse_symmetric
from rlspec.linalg.svd import SVDResult, svd


def spectrum(r: int) -> torch.Tensor:
    """Steep at first and flat at a cut of 20 %, (r,) float64, as an attention weight's."""
    t = torch.linspace(0, 1, r, dtype=torch.float64)
    return 9.5 - 9.4 * t.sqrt() + 10 * torch.exp(-60 * t)


def matrix(s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 square matrix with such singular values and random vectors."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(s), len(s)
    u, v = (
        torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator))[0] for _ in range(2)
    )
    return ((u * s) @ v.T).float()


def true_error(a: torch.Tensor, found: SVDResult) -> float:
    k = found.S.shape[-1]
    u, _, vh = torch.linalg.svd(a.double())
    left, right = principal_sines(u[:, :k], found.U), principal_sines(vh[:k].T, found.Vh.T)
    return float(torch.maximum(left[0], right[0]))


def outside(vectors: torch.Tensor, y: torch.Tensor) -> float:
    """How far the wanted vectors are from the span of y."""
    q = torch.linalg.qr(y.double())[0]
    return float(torch.linalg.matrix_norm(vectors - q @ (q.T @ vectors), 2))


@pytest.mark.parametrize(("products", "largest", "factor"), [("float32", 9.0, 1.1), ("bfloat16", 5.0, 200.0)])
def test_clearing_corrections_of_large_directions_keeps_their_rounding_from_growing(
    products: str, largest: float, factor: float
) -> None:
    """Against the same filter in float64. The broken twin clears nothing: what it adds is rounding alone.

    Rough products leave 2^-7 of an error: here 100 times what float64 leaves, and they may leave twice that.
    """
    n, k, width, degree = 300, 60, 96, 8
    s = torch.cat([torch.full((20,), largest), torch.linspace(1.6, 0.1, n - 20)]).double()
    generator = torch.Generator().manual_seed(0)
    v = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    c = (v * s.square()) @ v.T
    y = v[:, :width] + 1e-3 * torch.randn(n, width, dtype=torch.float64, generator=generator)
    y[:, :20] = v[:, :20] + 1e-9 * (y[:, :20] - v[:, :20])
    y = torch.linalg.qr(y)[0]
    theta, q = torch.linalg.eigh(y.T @ c @ y)
    z, theta = (y @ q.flip(-1))[None], theta.flip(-1)[None]
    residual = c @ z - z * theta.unsqueeze(-2)
    edge = torch.full((1, 1, 1), float(s[width]) ** 2, dtype=torch.float64)

    def error(apply: Callable[[torch.Tensor], torch.Tensor], narrow: bool, held: int) -> float:
        r, e = (residual.float(), edge.float()) if narrow else (residual, edge)
        return outside(v[:, :k], filter_correction(apply, z, r, theta, e, degree, held)[0])

    narrow = c.float()[None]
    rough = coarse_symmetric(narrow) if products == "bfloat16" else lambda x: narrow @ x
    start, truth = outside(v[:, :k], z[0]), error(lambda x: c @ x, False, 0)
    assert truth < 1e-3 * start
    assert error(rough, True, 20) < factor * truth
    assert error(rough, True, 0) > 100 * error(rough, True, 20)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("tol", [1e-4, 3e-5])
def test_a_tolerance_below_float32_residuals_is_met_without_a_dense_decomposition(
    tol: float, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(coarse.VARIABLE, products)
    a = matrix(spectrum(600))
    found = svd(a, 120, method="randomized", tol=tol)
    assert found.method == "randomized" and found.rounds <= 3 and not found.notes
    assert true_error(a, found) <= float(found.subspace_bound) < 1.1 * tol


def test_float32_residuals_alone_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin of the above."""
    monkeypatch.setenv(coarse.VARIABLE, "float32")
    monkeypatch.setattr(randomized, "rounding_blurs", lambda *_: False)
    found = svd(matrix(spectrum(600)), 120, method="randomized", tol=3e-5)
    assert found.method == "exact" and any("did not reach tol" in note for note in found.notes)


def test_rough_products_serve_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ordinary = randomized.coarse_symmetric

    def counted(c: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        calls.append(c.shape)
        return ordinary(c)

    monkeypatch.setattr(randomized, "coarse_symmetric", counted)
    a = matrix(spectrum(300))
    for products, dtype, rough in (
        ("float32", torch.float32, False),
        ("auto", torch.float32, False),  # so small a matrix gains nothing
        ("bfloat16", torch.float32, True),
        ("bfloat16", torch.float64, False),
    ):
        monkeypatch.setenv(coarse.VARIABLE, products)
        calls.clear()
        found = svd(a.to(dtype), 60, method="randomized", tol=1e-3)
        assert bool(calls) == rough and found.method == "randomized"
        assert true_error(a, found) <= float(found.subspace_bound) < 1e-3


def test_a_hopeless_sketch_goes_to_the_dense_routine_before_any_filter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dozens of values a hundred times the others mislead the estimate of where the unwanted part ends."""

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("a filter was tried")

    monkeypatch.setattr(randomized, "filter_correction", never)
    s = torch.cat([torch.logspace(3, 2, 40), torch.linspace(1.6, 0.4, 360)]).double()
    a = matrix(s)
    found = svd(a, 80, method="randomized")
    assert found.method == "exact" and "too little above the estimated spectrum" in found.notes[0]
    assert true_error(a, found) <= float(found.subspace_bound)
