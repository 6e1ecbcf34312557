"""``rlspec.svd`` on matrices with chosen spectra, hard shapes and bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import rlspec
from rlspec.errors import OptionError, TensorError
from rlspec.linalg import randomized
from rlspec.linalg import svd as module
from rlspec.linalg.angles import principal_sines
from rlspec.linalg.svd import SVDResult, svd


def matrix(s: torch.Tensor, m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A float64 matrix with singular values ``s`` and its vectors u (m, r), v (n, r)."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64, generator=generator))[0]
    return (u * s) @ v.T, u, v


def check_factors(a: torch.Tensor, found: SVDResult, k: int) -> None:
    """Shapes, orthonormal columns, order, and singular values against LAPACK, for a result of float32 accuracy."""
    lead, (m, n) = a.shape[:-2], a.shape[-2:]
    assert found.U.shape == (*lead, m, k) and found.S.shape == (*lead, k) and found.Vh.shape == (*lead, k, n)
    assert found.residuals.shape == (*lead, k) and found.subspace_bound.shape == lead
    eye = torch.eye(k, dtype=found.S.dtype)
    assert (found.U.mT @ found.U - eye).abs().max() < 2e-5
    assert (found.Vh @ found.Vh.mT - eye).abs().max() < 2e-5
    assert (found.S[..., :-1] >= found.S[..., 1:]).all()
    truth = torch.linalg.svdvals(a.double())[..., :k]
    assert ((found.S - truth).abs() <= 2e-6 * truth[..., :1]).all()
    assert (found.residuals <= 2e-2 * truth[..., :1] + 1e-30).all()


@pytest.mark.parametrize("method", ["randomized", "exact", "auto"])
@pytest.mark.parametrize("shape", [(160, 160), (210, 140), (140, 210)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_flat_spectrum(method: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    r = min(shape)
    a = matrix(1.5 - torch.linspace(0, 1.3, r, dtype=torch.float64), *shape)[0].to(dtype)
    found = svd(a, 28, method=method, tol=1e-3)  # type: ignore[arg-type]
    assert found.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.method == ("randomized" if method == "randomized" else "exact") and not found.notes
    check_factors(a, found, 28)
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    for truth, mine in ((u[:, :28], found.U), (vh[:28].T, found.Vh.T)):
        error = principal_sines(truth, mine)[0]
        assert error <= found.subspace_bound and error < 1e-3


def test_the_textbook_method_fails_where_this_one_does_not() -> None:
    """The broken twin: the same sketch with as many plain powers is two orders of magnitude off."""
    a = matrix(1.5 - torch.linspace(0, 1.3, 200, dtype=torch.float64), 200, 200)[0].float()
    truth = torch.linalg.svd(a.double())[2][:40].T
    torch.manual_seed(0)
    textbook = torch.svd_lowrank(a, q=64, niter=4)[2][:, :40]
    ours = svd(a, 40, method="randomized", tol=1e-3).Vh.T
    assert principal_sines(truth, textbook)[0] > 0.5
    assert principal_sines(truth, ours)[0] < 1e-3


def test_batches_equal_loops_to_the_tolerance_and_equal_calls_agree() -> None:
    spectra = [1.5 - torch.linspace(0, 1.3, 90, dtype=torch.float64) * f for f in (0.6, 0.8, 1.0, 1.1)]
    a = torch.stack([matrix(s, 100, 90, i)[0] for i, s in enumerate(spectra)]).float().reshape(2, 2, 100, 90)
    found = svd(a, 12, method="randomized", tol=1e-3)
    check_factors(a, found, 12)
    for i in range(4):
        one = svd(a[i // 2, i % 2], 12, method="randomized", tol=1e-3)
        assert torch.allclose(one.S, found.S[i // 2, i % 2], rtol=1e-6)
    again = svd(a, 12, method="randomized", tol=1e-3)
    assert torch.equal(again.U, found.U) and torch.equal(again.S, found.S)


@pytest.mark.parametrize("method", ["randomized", "exact"])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_hard_matrices(method: str, scale: float) -> None:
    ones = torch.ones(96, dtype=torch.float64)
    tail = torch.zeros(96, dtype=torch.float64)
    tail[:5] = torch.tensor([9.0, 5.0, 5.0, 3.0, 1.0])
    steps = torch.cat([torch.full((40,), 2.0), torch.full((56,), 1.0)]).double()
    spectra = {
        "equal": ones,
        "rank five": tail,
        "clusters": steps,
        "zero": 0 * ones,
        "rank one": tail * (tail == 9),
    }
    for name, s in spectra.items():
        a = (matrix(s, 110, 96)[0] * scale).float()
        found = svd(a, 10, method=method, tol=1e-3)  # type: ignore[arg-type]
        check_factors(a, found, 10)
        # sigma_10 = sigma_11 in all of them, up to the rounding to float32, which a bound may see or not.
        if name in ("zero", "rank five", "rank one"):
            assert torch.isinf(found.subspace_bound), name
        else:
            truth = torch.linalg.svd(a.double() / scale)[2][:10].T
            assert principal_sines(truth, found.Vh.T)[0] <= found.subspace_bound, name


def test_a_cut_inside_a_cluster_still_finds_the_cluster() -> None:
    s = torch.cat([torch.full((20,), 2.0), torch.linspace(1.6, 0.5, 80)]).double()
    a, _, v = matrix(s, 100, 100)
    found = svd(a.float(), 12, method="randomized", tol=1e-3)
    assert found.method == "randomized" and found.notes and torch.isinf(found.subspace_bound)
    assert principal_sines(v[:, :20], found.Vh.T)[0] < 1e-3


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 1, 5), (2, 6, 6)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    a = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for method in ("auto", "exact", "randomized"):
        found = svd(a, method=method)  # type: ignore[arg-type]
        check_factors(a, found, min(shape[-2:]))
        assert found.method == "exact"
        assert bool(found.notes) == (method == "randomized")


@pytest.mark.parametrize("shape", [(0, 4, 3), (0, 3), (3, 0), (2, 0, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    found = svd(torch.zeros(shape))
    k = min(shape[-2:])
    assert found.U.shape == (*shape[:-1], k) and found.Vh.shape == (*shape[:-2], k, shape[-1])


def columns_multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each product with AᵀA has had, from now on."""
    ordinary, columns = randomized._operator, []

    def counted(a: torch.Tensor, width: int) -> Callable[[torch.Tensor], torch.Tensor]:
        apply = ordinary(a, width)

        def multiply(z: torch.Tensor) -> torch.Tensor:
            columns.append(z.shape[-1])
            return apply(z)

        return multiply

    monkeypatch.setattr(randomized, "_operator", counted)
    return columns


@pytest.mark.parametrize(("r", "k"), [(150, 30), (400, 80)])
@pytest.mark.parametrize(("size", "share"), [(3e-5, 0.8), (3e-4, 0.9), (1e-3, 0.95)])
def test_warm_start_saves_work(
    r: int, k: int, size: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At updates of 0.05 to 2 % of the weight's norm, and in the same number of rounds; a start that knows nothing does
    not."""
    g = torch.Generator().manual_seed(0)
    base, _, _ = matrix(1.5 - torch.linspace(0, 1.3, r, dtype=torch.float64), r + 30, r)
    moved = (base + size * torch.randn(r + 30, r, dtype=torch.float64, generator=g)).float()
    first = svd(base.float(), k, method="randomized", tol=1e-3)
    columns = columns_multiplied(monkeypatch)
    work = {}
    nothing = torch.linalg.qr(torch.randn(r, k, generator=g)).Q.T
    for name, start in (("cold", None), ("warm", first), ("lost", nothing)):
        columns.clear()
        method = "randomized" if start is None else "warm"
        found = svd(moved, k, method=method, tol=1e-3, warm_start=start)  # type: ignore[arg-type]
        work[name] = sum(columns), found.rounds
    assert work["warm"][0] < share * work["cold"][0] < work["lost"][0], work
    assert work["warm"][1] == work["cold"][1] == 1


def test_warm_start_reaches_the_same_place() -> None:
    base, _, _ = matrix(1.5 - torch.linspace(0, 1.3, 150, dtype=torch.float64), 180, 150)
    moved = (base + 1e-3 * torch.randn(180, 150, dtype=torch.float64)).float()
    for a, b in ((base.float(), moved), (base.float().T, moved.T)):
        first = svd(a, 30, method="randomized", tol=1e-3)
        second = svd(b, 30, method="warm", tol=1e-3, warm_start=first)
        assert second.method == "warm"
        check_factors(b, second, 30)
        truth = torch.linalg.svd(b.double(), full_matrices=False)[2][:30].T
        assert principal_sines(truth, second.Vh.T)[0] <= second.subspace_bound


def test_failure_to_converge_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    a = matrix(1.5 - torch.linspace(0, 0.2, 120, dtype=torch.float64), 120, 120)[0].float()
    found = svd(a, 24, method="randomized", tol=1e-4, max_rounds=1)
    assert found.notes and "used exact" in found.notes[0]
    assert found.subspace_bound < 1e-4
    check_factors(a, found, 24)
    monkeypatch.setattr(module, "sketch_width", lambda k, n: n)
    assert "used exact" in svd(a, 24, method="randomized").notes[0]


def test_refusals() -> None:
    a = torch.randn(2, 5, 4)
    a[1, 3, 2] = float("nan")
    with pytest.raises(TensorError, match=r"nan at position \(1, 3, 2\)"):
        svd(a)
    with pytest.raises(TensorError, match=r"inf at position \(0, 0\)"):
        svd(torch.full((2, 2), float("inf")))
    for bad in (0, 6, True, 2.0, -1):
        with pytest.raises(OptionError, match="rank"):
            svd(torch.eye(5), bad)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="exact, randomized, warm"):
        svd(torch.eye(3), method="magic")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="warm_start"):
        svd(torch.eye(3), method="warm")
    with pytest.raises(OptionError, match="tol"):
        svd(torch.eye(3), tol=0)
    with pytest.raises(TensorError, match="float"):
        svd(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TensorError, match="shape"):
        svd(torch.ones(3))
    with pytest.raises(TensorError, match="another shape"):
        svd(torch.eye(5), 2, method="warm", warm_start=svd(torch.eye(4), 2))


def test_it_is_public() -> None:
    assert rlspec.svd is svd


def test_rank_may_be_a_share() -> None:
    a = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rlspec.svd(a, 0.2).S, rlspec.svd(a, 6).S)
    assert rlspec.svd(a, 1e-3).S.shape == (2, 1)
    assert torch.equal(rlspec.svd(a, 1.0).S, rlspec.svd(a, 30).S)
    for rank in (0.0, 1.5, True, 31):
        with pytest.raises(OptionError, match="must be a count from 1"):
            rlspec.svd(a, rank)


def test_a_fallback_of_all_matrices_says_exact() -> None:
    found = rlspec.svd(torch.zeros(300, 300), 30, method="randomized")
    assert found.method == "exact" and any("used exact" in note for note in found.notes)


@pytest.mark.parametrize("method", ["randomized", "exact", "warm"])
def test_autocast_does_not_reach_it(method: str) -> None:
    a = torch.randn(300, 200)
    start = svd(a, 8) if method == "warm" else None
    right = svd(a, 8, method=method, warm_start=start)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = svd(a, 8, method=method, warm_start=start)  # type: ignore[arg-type]
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found.U, right.U) and torch.equal(found.S, right.S) and torch.equal(found.Vh, right.Vh)
    assert found.method == right.method == method and found.notes == right.notes
    check_factors(a, found, 8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_decomposed_as_the_numbers_it_holds(dtype: torch.dtype) -> None:
    a = torch.randn(2, 32, 24).to(dtype)
    check_factors(a.float(), svd(a, 4), 4)
    a[1, 2, 3] = torch.nan
    with pytest.raises(TensorError, match=r"nan at position \(1, 2, 3\)"):
        svd(a)


def test_what_has_no_entries_to_decompose_is_refused() -> None:
    with pytest.raises(
        TensorError, match=r"dense tensor, found torch.sparse_coo \(16, 16\); give its to_dense\(\)"
    ):
        svd(torch.eye(16).to_sparse())
    with pytest.raises(TensorError, match="torch.sparse_csr"):
        svd(torch.eye(16).to_sparse_csr())
    with pytest.raises(TensorError, match=r"\(8, 8\) on the meta device"):
        svd(torch.empty(8, 8, device="meta"))


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("largest", [3.3e38, 1e-37])
def test_values_near_the_ends_of_float32_are_right(method: str, largest: float) -> None:
    """Squares of such entries, and of their residuals, lie outside the range."""
    s = torch.linspace(1, 0.01, 200, dtype=torch.float64)
    a = (largest * matrix(s, 300, 200)[0]).float()
    found = svd(a, 8, method=method)  # type: ignore[arg-type]
    assert found.method == method
    check_factors(a, found, 8)
    assert torch.isfinite(found.residuals).all() and (found.residuals < 1e-3 * largest).all()
    assert (found.residuals > 0).any()


def test_the_largest_float_is_a_singular_value() -> None:
    a = torch.diag(torch.tensor([torch.finfo(torch.float32).max, 1e38, 1e37]))
    torch.testing.assert_close(svd(a).S, a.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_values_past_float32_are_refused_with_the_way_out(method: str) -> None:
    a = torch.stack([torch.eye(300, 200), 5e37 * torch.randn(300, 200)])
    with pytest.raises(
        TensorError, match="matrix 1 of the batch has .* past the range of torch.float32.*as float64"
    ):
        svd(a, 4, method=method)  # type: ignore[arg-type]
    truth = torch.linalg.svdvals(a.double())[:, :4]
    torch.testing.assert_close(svd(a.double(), 4).S, truth, rtol=1e-9, atol=0)
    with pytest.raises(TensorError, match="torch.float64.*scale it down"):
        svd(torch.full((4, 4), 1e308, dtype=torch.float64))
