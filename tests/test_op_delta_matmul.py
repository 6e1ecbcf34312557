"""delta_matmul: on the CPU against its twin, and the kernel in Triton's interpreter (another process)."""

from __future__ import annotations

import importlib.util
import sys

import op_cases
import pytest
import torch
from interpreter_run import run_interpreted
from op_cases import Case

from rlspec.errors import TensorError
from rlspec.ops.delta_matmul import delta_matmul, delta_rmatmul
from rlspec.ops.reference import delta_matmul_ref, delta_ref, delta_rmatmul_ref


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("delta_matmul.py")


@pytest.mark.parametrize("case", op_cases.SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [50, 1 << 21])
def test_products(monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, entries: int) -> None:
    monkeypatch.setattr(sys.modules["rlspec.ops.delta_matmul"], "_BLOCK", entries)
    weight, reference = op_cases.pair(case)
    e = delta_ref(weight, reference)
    for run, twin, transposed in (
        (delta_matmul, delta_matmul_ref, False),
        (delta_rmatmul, delta_rmatmul_ref, True),
    ):
        x = op_cases.block(case, transposed, dtype)
        found, truth = run(weight, reference, x), twin(weight, reference, x)
        # A rounding of each entry of both weights, where they hold more than the dtype, and sums of K products.
        size = (weight.double().abs() + reference.double().abs()) if e.dtype != dtype else e.abs()
        sides = (e.abs().mT, size.mT) if transposed else (e.abs(), size)
        exact = case.dtype != torch.float64 and case.base_dtype != torch.float64
        unit = torch.finfo(dtype).eps / 2
        bar = (x.shape[-2] + 2) * unit * (sides[0] @ x.double().abs())
        bar += 0 if exact else unit * (sides[1] @ x.double().abs())
        assert found.dtype == dtype and found.shape == truth.shape
        assert bool(((found.double() - truth).abs() <= bar).all())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 4, 3), (2, 4, 1)), "one shape"),
        (((3, 4), (3, 4), (4, 1)), "one shape"),
        (((2, 3, 4), (2, 3, 4), (2, 3, 1)), r"x of shape \(2, 4, c\)"),
        (((2, 3, 4), (2, 3, 4), (1, 4, 1)), r"x of shape \(2, 4, c\)"),
    ],
)
def test_other_shapes_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(TensorError, match=message):
        delta_matmul(*(torch.zeros(shape) for shape in shapes))
