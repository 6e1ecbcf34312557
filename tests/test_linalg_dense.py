"""Full decompositions: the identities that any SVD must satisfy, and the way round a failed LAPACK call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import rlspec
from rlspec.linalg import dense
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
    """A solver called elsewhere would run on a device, and by a threshold of its own."""
    solver = re.compile(
        r"linalg\.(eig\w*|svd\w*|qr|matrix_norm|pinv|lstsq|matrix_rank|cond)\(|svd_lowrank|\.symeig"
    )
    package = Path(rlspec.__file__).parent
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if solver.search(p.read_text())}
    assert found == {"linalg/dense.py"}
