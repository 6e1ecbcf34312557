"""Reference decompositions by both routes: orthonormal, complete, and LAPACK's values."""

from __future__ import annotations

import pytest
import torch

from rlspec.linalg import dense
from rlspec.linalg.dense import thin_svd
from rlspec.linalg.factor import reference_factors

F64 = torch.float64


def matrix(m: int, n: int, smallest: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(m + n)
    r = min(m, n)
    u = torch.linalg.qr(torch.randn(m, r, dtype=F64, generator=g)).Q
    v = torch.linalg.qr(torch.randn(n, r, dtype=F64, generator=g)).Q
    return (u * torch.logspace(0, float(torch.tensor(smallest).log10()), r, dtype=F64)) @ v.T


@pytest.mark.parametrize("shape", [(400, 400), (390, 420), (420, 390)])
@pytest.mark.parametrize("smallest", [0.3, 1e-3, 1e-4])
def test_the_gram_route_is_a_float64_decomposition(shape: tuple[int, int], smallest: float) -> None:
    a = matrix(*shape, smallest)
    assert min(shape) > dense.SMALL and dense._mended_svd(a, dense.FLOAT64) is not None
    u, s, vh = thin_svd(a)
    r = min(shape)
    eye = torch.eye(r, dtype=F64)
    assert float((u.mT @ u - eye).abs().max()) < 1e-12
    assert float((vh @ vh.mT - eye).abs().max()) < 1e-12
    # LAPACK's own error, grown by the condition number as the docstring says; 5 for another order of summation.
    u0, s0, vh0 = torch.linalg.svd(a, full_matrices=False)
    bar = 5.0 * float(((u0 * s0) @ vh0 - a).norm()) / smallest
    assert float(((u * s) @ vh - a).norm()) < bar
    assert float((s - s0).abs().max()) < bar
    assert bool((s[1:] <= s[:-1]).all())


@pytest.mark.parametrize("smallest", [1e-7, 1e-12])
def test_ill_conditioned_matrices_go_to_lapack(smallest: float) -> None:
    a = matrix(400, 400, smallest)
    assert dense._mended_svd(a, dense.FLOAT64) is None
    u, s, vh = thin_svd(a)
    assert float((u.mT @ u - torch.eye(400, dtype=F64)).abs().max()) < 1e-12
    torch.testing.assert_close(s, torch.linalg.svdvals(a), rtol=1e-6, atol=1e-14)
    assert float(((u * s) @ vh - a).norm()) < 1e-12


def test_rank_deficient_weights_have_orthonormal_factors_too() -> None:
    a = matrix(400, 400, 0.5)
    a[:, 200:] = 0.0
    u, s, vh = reference_factors(a)
    assert u.dtype == vh.dtype == torch.float32 and s.dtype == F64
    for x in (u.double().mT @ u.double(), vh.double() @ vh.double().mT):
        assert float((x - torch.eye(400, dtype=F64)).abs().max()) < 1e-5
    assert int((s > 1e-10).sum()) == 200
    assert float(((u.double() * s) @ vh.double() - a).norm()) < 1e-5


def test_skipping_the_newton_step_costs_orthogonality_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin that must fail: with every departure declared good enough, left vectors are visibly not orthogonal."""
    a = matrix(400, 400, 1e-4)
    careless = dense._mended_svd(a, 1.0)
    assert careless is not None
    eye = torch.eye(400, dtype=F64)
    assert float((careless[0].mT @ careless[0] - eye).abs().max()) > 1e-11
