"""chebyshev_step: on the CPU against its twin, and the kernel in Triton's interpreter (another process)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreter_run import run_interpreted

from rlspec.ops.chebyshev_step import Correction, Moments, chebyshev_step
from rlspec.ops.reference import chebyshev_step_ref


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("chebyshev_step.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("formed", [False, True])
def test_against_float64(dtype: torch.dtype, formed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 9, 7, generator=g, dtype=torch.float64)
    y, before, residual = torch.randn(3, 2, 7, 5, generator=g, dtype=torch.float64)
    ratio, following = torch.rand(2, 2, 1, 5, generator=g, dtype=torch.float64)
    edge = torch.tensor([3.0, 5.0], dtype=torch.float64)[:, None, None]
    c = a.mT @ a
    there = [t.to(dtype) for t in (y, before, edge)]
    apply = Moments(c if formed else a.mT, formed, lambda z: c.to(z) @ z)
    found = chebyshev_step(apply, *there)
    close = {"rtol": 0.0, "atol": 300 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found.double(), chebyshev_step_ref(c, y, before, edge), **close)
    first = chebyshev_step(apply, there[0], None, there[2])
    torch.testing.assert_close(first.double(), 2 / edge * (c @ y) - y, **close)
    correction = Correction(residual, ratio, following)
    found = chebyshev_step(apply, *there, Correction(*(t.to(dtype) for t in vars(correction).values())))
    torch.testing.assert_close(found.double(), chebyshev_step_ref(c, y, before, edge, correction), **close)


def test_steps_are_the_chebyshev_polynomials() -> None:
    """Of a number: T_d(x) at x = 2 theta/edge - 1 is cos(d arccos x)."""
    theta, edge = torch.tensor([[[0.3]]], dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    previous, current = one, chebyshev_step(lambda y: theta * y, one, None, edge)
    for degree in range(1, 8):
        assert float(current) == pytest.approx(
            float(torch.cos(degree * torch.arccos(2 * theta - 1))), abs=1e-14
        )
        previous, current = current, chebyshev_step(lambda y: theta * y, current, previous, edge)
