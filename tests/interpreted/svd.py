"""rlspec.svd with the kernels, in Triton's interpreter: the numbers of the CPU path.

Run by tests/test_linalg_kernels.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

import rlspec
from rlspec.kernels import chebyshev_step as step
from rlspec.kernels import gram, residual_norms
from rlspec.ops.draws import Signs
from rlspec.ops.reference import residual_norms_ref

TOL = 1e-4


def matrices(m: int, n: int, k: int) -> Tensor:
    """Two matrices whose singular values fall by half at the cut."""
    g = torch.Generator().manual_seed(0)
    r = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(2, d, r, generator=g, dtype=torch.float64))[0] for d in (m, n))
    s = torch.linspace(3, 2, r, dtype=torch.float64)
    s[k:] *= 0.5
    return ((u * s) @ v.mT).float()


@pytest.mark.parametrize(("m", "n", "k"), [(144, 130, 20), (130, 144, 20), (700, 720, 2)], ids=str)
@pytest.mark.parametrize("warm", [False, True])
def test_triplets_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int, warm: bool
) -> None:
    a = matrices(m, n, k)
    options = (
        {"method": "warm", "warm_start": rlspec.svd(a + 1e-3 * torch.randn(a.shape), k)}
        if warm
        else {"method": "randomized"}
    )
    on_cpu = rlspec.svd(a, k, tol=TOL, **options)
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    with (
        mock.patch.object(step, "chebyshev_step_triton", side_effect=step.chebyshev_step_triton) as steps,
        mock.patch.object(gram, "gram_triton", side_effect=gram.gram_triton) as grams,
        mock.patch.object(residual_norms, "_check", side_effect=residual_norms._check) as residuals,
        mock.patch.object(Signs, "dense", side_effect=AssertionError("the sketch was stored")),
    ):
        found = rlspec.svd(a, k, tol=TOL, **options)
    assert steps.call_count >= 2 and grams.call_count >= 4 and residuals.call_count == 2
    matrix, block, current = steps.call_args.args[:3]
    # Small shares apply Aᵀ(A y), whose image the step takes; its matrix is laid out once.
    assert (block is current) == (k == 20) and matrix.is_contiguous()
    assert (found.method, found.rounds, found.notes) == (on_cpu.method, on_cpu.rounds, on_cpu.notes)
    exact = torch.linalg.svd(a.double())
    torch.testing.assert_close(found.S.double(), exact.S[:, :k], rtol=3e-6, atol=0.0)
    truth = residual_norms_ref(a, found.U, found.S, found.Vh.mT)
    torch.testing.assert_close(found.residuals.double(), truth, rtol=0.0, atol=2e-6)
    for i in range(2):
        for mine, theirs, truth in (
            (found.U[i], on_cpu.U[i], exact.U[i, :, :k]),
            (found.Vh[i].mT, on_cpu.Vh[i].mT, exact.Vh[i, :k].mT),
        ):
            assert sine(mine, truth) <= min(TOL, float(found.subspace_bound[i]))
            assert sine(mine, theirs) <= TOL


def sine(x: Tensor, y: Tensor) -> float:
    """Of the largest angle between the spans of two orthonormal bases."""
    x, y = x.double(), y.double()
    return float(torch.linalg.matrix_norm(x - y @ (y.mT @ x), 2))
