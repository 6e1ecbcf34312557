"""residual_norms: on the CPU against its twin, and the kernel in Triton's interpreter (another process)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreter_run import run_interpreted

from rlspec.ops.reference import residual_norms_ref
from rlspec.ops.residual_norms import residual_norms


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("residual_norms.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(9, 7), (5, 12)])
def test_against_float64(m: int, n: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, m, n), (2, m, 4), (2, 4), (2, n, 4))
    a, u, s, v = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    found = residual_norms(a, u, s, v)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), residual_norms_ref(a, u, s, v), rtol=20 * torch.finfo(dtype).eps, atol=0.0
    )


def test_triplets_with_one_vector_turned() -> None:
    """Of exact triplets nothing is left; a right vector turned by an angle misses A v = s u by what it turned into."""
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))[None]
    eye = torch.eye(3, dtype=torch.float64)[None]
    assert residual_norms(a, eye, a[0].diagonal()[None], eye).tolist() == [[0.0, 0.0, 0.0]]
    turned = eye.clone()
    turned[0, :, 0] = torch.tensor([0.8, 0.6, 0.0])
    # A v - 3 u = (-0.6, 1.2, 0); Aᵀ u - 3 v = (0.6, -1.8, 0), the longer.
    assert float(residual_norms(a, eye, a[0].diagonal()[None], turned)[0, 0]) == pytest.approx(3.6**0.5)
