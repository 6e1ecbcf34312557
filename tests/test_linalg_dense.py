"""Full decompositions: the identities that any SVD must satisfy, and the way round a failed LAPACK call."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rlspec
from rlspec.linalg import dense, orth
from rlspec.linalg.dense import lapack_svd

SHAPES = [(7, 7), (12, 5), (5, 12), (1, 6), (6, 1), (1, 1), (0, 4), (4, 0), (3, 8, 6), (0, 5, 4)]


def check(a: torch.Tensor, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, sigma_tol: float) -> None:
    """u, s, vh are a thin SVD of ``a`` to rounding, singular values to ``sigma_tol`` of the largest."""
    r = min(a.shape[-2:])
    lead = a.shape[:-2]
    assert u.shape == (*a.shape[:-1], r) and s.shape == (*lead, r) and vh.shape == (*lead, r, a.shape[-1])
    if a.numel() == 0:
        return
    eps = torch.finfo(s.dtype).eps
    eye = torch.eye(r, dtype=s.dtype)
    largest = max(float(s.max()), torch.finfo(s.dtype).tiny)
    assert (u.mT @ u - eye).abs().max() < 40 * eps
    assert (vh @ vh.mT - eye).abs().max() < 40 * eps
    assert (s[..., :-1] >= s[..., 1:]).all() and (s >= 0).all()
    assert ((u * s.unsqueeze(-2)) @ vh - a.to(s.dtype)).abs().max() < max(40 * eps, sigma_tol) * largest
    truth = torch.linalg.svdvals(a.to(torch.float64))
    assert (s.double() - truth).abs().max() < max(40 * eps, sigma_tol) * largest


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identities(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    u, s, vh = lapack_svd(a)
    assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(a, u, s, vh, 0.0)


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s])
def test_the_gram_route_is_a_decomposition_too(shape: tuple[int, ...]) -> None:
    a = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    check(a, *dense._svd_by_gram_and_qr(a), sigma_tol=3e-8)
    deficient = a.clone()
    deficient[..., -1, :] = deficient[..., 0, :]
    check(deficient, *dense._svd_by_gram_and_qr(deficient), sigma_tol=3e-8)
    check(torch.zeros(shape), *dense._svd_by_gram_and_qr(torch.zeros(shape)), sigma_tol=3e-8)
    check(a * 1e-200, *dense._svd_by_gram_and_qr(a * 1e-200), sigma_tol=3e-8)


def test_a_failed_lapack_call_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    a = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = torch.linalg.svdvals(a)
    monkeypatch.setattr(dense.torch.linalg, "svd", fail)
    u, s, vh = lapack_svd(a)
    assert (s - wanted).abs().max() < 1e-8
    assert ((u * s) @ vh - a).abs().max() < 1e-8


def test_decompositions_have_one_door() -> None:
    """A solver called elsewhere would run on a device, and by a threshold of its own. Twins are for tests alone."""
    solver = re.compile(
        r"linalg\.(eig\w*|svd\w*|qr|matrix_norm|pinv|lstsq|matrix_rank|cond)\(|svd_lowrank|\.symeig"
    )
    package = Path(rlspec.__file__).parent
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if solver.search(p.read_text())}
    assert found == {"linalg/dense.py", "ops/reference.py"}


F64 = torch.float64


def planted(s: torch.Tensor, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """(m, n) float64 with the singular values ``s`` (min(m, n))."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(s), dtype=F64, generator=g)).Q
    v = torch.linalg.qr(torch.randn(n, len(s), dtype=F64, generator=g)).Q
    return (u * s.to(F64)) @ v.T


def departure(q: torch.Tensor) -> float:
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())


# Values of a core; what is beyond the Gram matrix's reach (ratio over 30) goes to LAPACK.
CORES = {
    "flat": 3 / (1 + 4 * torch.arange(80) / 400),
    "clusters": torch.cat([torch.full((30,), 3.0), torch.full((30,), 2.0), torch.linspace(1.99, 1, 20)]),
    "equal": torch.full((80,), 2.0),
    "steep": torch.logspace(0, -12, 80),
    "deficient": torch.cat([torch.linspace(3, 1, 50), torch.zeros(30)]),
    "zero": torch.zeros(80),
}


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
@pytest.mark.parametrize("turned", [False, True])
def test_cores_of_mixed_difficulty_in_one_batch(turned: bool, scale: float) -> None:
    """Planted values come back to rounding, bases orthonormal; nearly diagonal cores and others, at any scale."""
    truth = torch.stack([s.to(F64) for s in CORES.values()])
    cores = torch.stack([planted(s, 80, 80) for s in truth]) if turned else torch.diag_embed(truth)
    cores = cores * scale
    u, s, z = dense.core_svd(cores)
    assert float((s / scale - truth).abs().max()) < 2e-14
    assert bool((s[..., 1:] <= s[..., :-1]).all()) and bool((s >= 0).all())
    assert max(departure(u), departure(z)) < 1e-12
    assert float(((u * s.unsqueeze(-2)) @ z.mT - cores).abs().max()) < 2e-14 * scale


def test_a_core_does_not_depend_on_its_neighbours() -> None:
    cores = torch.stack([planted(s, 80, 80) for s in CORES.values()])
    together = dense.core_svd(cores)
    for i, core in enumerate(cores):
        for mine, alone in zip(together, dense.core_svd(core[None]), strict=True):
            assert torch.equal(mine[i], alone[0])


def test_small_cores_are_those_of_closed_forms() -> None:
    (u, s, z) = dense.core_svd(torch.tensor([[[-2.0]], [[0.0]], [[5.0]]], dtype=F64))
    assert s.flatten().tolist() == [2.0, 0.0, 5.0]
    assert (u * z).flatten()[[0, 2]].tolist() == [-1.0, 1.0]
    # [[a, b], [-b, a]] stretches everything by the length of (a, b); [[1, 1], [0, 1]] by the golden ratio, and its
    # inverse.
    golden = (1 + 5**0.5) / 2
    cores = torch.tensor([[[3.0, 4.0], [-4.0, 3.0]], [[1.0, 1.0], [0.0, 1.0]]], dtype=F64)
    u, s, z = dense.core_svd(cores)
    wanted = torch.tensor([[5.0, 5.0], [golden, 1 / golden]], dtype=F64)
    torch.testing.assert_close(s, wanted, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close((u * s.unsqueeze(-2)) @ z.mT, cores, rtol=0, atol=4e-15)


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (400, 100), (12, 5)])
@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_singular_values_of_tall_and_wide_matrices(shape: tuple[int, int], scale: float) -> None:
    r = min(shape)
    truth = torch.cat([torch.linspace(1, 0.2, r - 3, dtype=F64), torch.tensor([1e-3, 1e-6, 0.0], dtype=F64)])
    a = planted(truth, *shape)
    found = dense.singular_values(torch.stack([a, 2 * a]) * scale) / scale
    torch.testing.assert_close(found, torch.stack([truth, 2 * truth]), rtol=1e-14, atol=4e-8)
    exactly = dense.lapack_values(a * scale) / scale
    torch.testing.assert_close(exactly, truth, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_large_matrices_of_extreme_scale(scale: float) -> None:
    truth = torch.linspace(1, 0.1, 400, dtype=F64)
    a = planted(truth, 410, 400) * scale
    u, s, vh = dense.thin_svd(a)
    assert float((s / scale - truth).abs().max()) < 1e-13
    assert max(departure(u), departure(vh.mT)) < 1e-12
    assert float(((u * s) @ vh - a).abs().max()) < 1e-13 * scale


def test_leading_triplets_say_where_squares_do_not_do() -> None:
    good, bad = torch.linspace(1, 0.1, 40), torch.logspace(0, -7, 40)
    a = torch.stack([planted(s, 60, 40) for s in (good, bad, torch.zeros(40))]).float()
    u, s, v, usable = dense.leading_by_gram(a, 30)
    assert usable.tolist() == [True, False, False]
    truth = torch.linalg.svdvals(a[0].double())
    torch.testing.assert_close(s[0], truth, rtol=0, atol=1e-14)
    assert max(departure(u[0]), departure(v[0])) < 1e-12


def test_pencils_of_planted_values() -> None:
    """K q = M q theta with K = L Q diag(theta) Qᵀ Lᵀ and M = L Lᵀ."""
    theta = torch.tensor([[4.0, 4.0, 1.0, 0.5], [1e-6, 1e-7, 0.0, 0.0]], dtype=F64)
    lower = torch.eye(4, dtype=F64) + torch.tril(torch.ones(4, 4, dtype=F64), -1)
    turn = planted(torch.ones(4), 4, 4)
    stiffness = lower @ (turn * theta.unsqueeze(-2)) @ turn.T @ lower.T
    moments = (lower @ lower.T).expand(2, 4, 4)
    found, q = dense.pencil(moments, stiffness, F64)
    torch.testing.assert_close(found, theta, rtol=0, atol=2e-14)
    torch.testing.assert_close(
        q.mT @ moments @ q, torch.eye(4, dtype=F64).expand(2, 4, 4), rtol=0, atol=1e-14
    )
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        dense.pencil(torch.diag_embed(torch.tensor([[1.0, -1e-9]])), torch.eye(2)[None], F64)


NEARLY = torch.cat([torch.ones(7), torch.full((1,), 3e-8)])


def test_orthonormal_bases_of_nearly_dependent_columns() -> None:
    deficient = torch.cat([torch.ones(6), torch.zeros(2)])
    y = torch.stack([planted(s, 60, 8) for s in (torch.ones(8), NEARLY, deficient)])
    for block, bar in ((y, 1e-14), (y.float(), 2e-6)):
        q = orth.orthonormal(block)
        assert departure(q) < bar
        assert float((q @ (q.mT @ block) - block).abs().max()) < bar
        for mine, alone in zip(q, block, strict=True):  # whatever its neighbours
            assert torch.equal(mine, orth.orthonormal(alone))


def test_only_the_block_that_needs_it_gets_a_larger_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger shift leaves a worse condition number: one that a dependent neighbour needs must not reach the others."""
    good = planted(torch.linspace(1, 0.01, 8), 60, 8)
    of, calls = torch.linalg.cholesky_ex, []

    def second_fails(a: torch.Tensor, upper: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(a)
        factor, info = of(a, upper=upper)
        return factor, info + torch.tensor([0, 1]) * (len(calls) < 3)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", second_fails)
    first, second = orth.well_conditioned(torch.stack([good, good]))
    assert len(calls) == 3
    assert departure(first) < 1e-8 < departure(second)


# What a check decides, with the check made blind, and by how much the result is then wrong.
def careless_core(blind: pytest.MonkeyPatch) -> float:
    blind.setattr(dense, "_CORE_CONDITION", math.inf)
    return departure(dense.core_svd(planted(torch.logspace(0, -6, 80), 80, 80)[None])[0])


def careless_leading(blind: pytest.MonkeyPatch) -> float:
    blind.setattr(dense, "_LEADING_CONDITION", 1e300)
    u, _, _, usable = dense.leading_by_gram(planted(torch.logspace(0, -12, 40), 60, 40)[None], 40)
    return departure(u) if bool(usable) else 0.0


def careless_order(blind: pytest.MonkeyPatch) -> float:
    blind.setattr(dense, "_in_order", lambda u, s, v: (u, s, v))
    s = dense.core_svd(planted(CORES["equal"], 80, 80)[None])[1]
    return float((s[..., 1:] > s[..., :-1]).sum())


def careless_scale(blind: pytest.MonkeyPatch) -> float:
    blind.setattr(dense, "into_range", lambda a: (a, None))
    return float((dense.singular_values(torch.eye(80, dtype=F64) * 1e-200) - 1e-200).abs().max() / 1e-200)


def careless_second_pass(blind: pytest.MonkeyPatch) -> float:
    blind.setattr(orth, "_SQUARED", math.inf)
    return departure(orth.orthonormal(planted(NEARLY, 60, 8).float())) - 2e-6


def careless_pencil(blind: pytest.MonkeyPatch) -> float:
    def never_fails(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lower, info = of(a)
        return lower, torch.zeros_like(info)

    of = torch.linalg.cholesky_ex
    blind.setattr(torch.linalg, "cholesky_ex", never_fails)
    moments = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]], dtype=F64)
    _, q = dense.pencil(moments, torch.eye(2, dtype=F64)[None], F64)
    return float((q.mT @ moments @ q - torch.eye(2)).abs().max())


@pytest.mark.parametrize(
    "twin",
    [careless_core, careless_leading, careless_order, careless_scale, careless_second_pass, careless_pencil],
)
def test_every_check_is_needed(
    twin: Callable[[pytest.MonkeyPatch], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert twin(monkeypatch) > 1e-9
