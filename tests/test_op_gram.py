"""gram: on the CPU against its twin, and the kernel in Triton's interpreter (another process)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreter_run import run_interpreted

from rlspec.ops.gram import gram
from rlspec.ops.reference import gram_ref


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("gram.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5, 7), (2, 9, 800), (4, 0), (0, 3, 2)], ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    found = gram(a)
    assert found.dtype == dtype and found.shape == (*shape[:-2], shape[-1], shape[-1])
    bar = (shape[-2] + 2) * torch.finfo(dtype).eps * gram_ref(a.abs())
    assert bool(((found.double() - gram_ref(a)).abs() <= bar).all())
