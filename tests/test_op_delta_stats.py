"""delta_stats: on the CPU against its twin, and the kernel in Triton's interpreter (another process)."""

from __future__ import annotations

import importlib.util
import sys

import op_cases
import pytest
import torch
from interpreter_run import run_interpreted
from op_cases import Case

from rlspec.errors import TensorError
from rlspec.ops.delta_stats import delta_dtype, delta_stats
from rlspec.ops.reference import delta_ref, delta_stats_ref


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("delta_stats.py")


@pytest.mark.parametrize("case", op_cases.SMALL, ids=str)
@pytest.mark.parametrize("block", [1, 100, 1 << 18])
def test_sums_counts_and_the_update(monkeypatch: pytest.MonkeyPatch, case: Case, block: int) -> None:
    monkeypatch.setattr(sys.modules["rlspec.ops.delta_stats"], "_BLOCK", block)
    weight, reference = op_cases.pair(case)
    wide = delta_dtype(weight, reference)
    out = torch.full(case.shape, torch.nan, dtype=wide)
    found, truth = (
        delta_stats(weight, reference, eta=1e-3, out=out),
        delta_stats_ref(weight, reference, eta=1e-3),
    )
    # One rounding: differences of 16-bit numbers have none.
    torch.testing.assert_close(out, delta_ref(weight, reference).to(wide), rtol=0, atol=0)
    for mine, exact in zip(found[:3], truth[:3], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-6 if wide == torch.float32 else 1e-14, atol=0)
    assert torch.equal(found.unchanged, truth.unchanged)
    if case.shape[0] > 1 and case.dtype == case.base_dtype:  # the first matrix did not move
        assert found.delta_sq[0] == 0 and found.unchanged[0] == weight[0].numel()
        assert bool((found.unchanged[1:] > 0).all()) and bool((found.unchanged[1:] < weight[0].numel()).all())
    alone = delta_stats(weight, reference, eta=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))  # E is not needed for its sums


def test_strided_views() -> None:
    g = torch.Generator().manual_seed(1)
    reference = torch.randn(2, 9, 14, generator=g).bfloat16()
    weight = torch.randn(2, 14, 9, generator=g).mT
    found, truth = delta_stats(weight, reference, eta=1e-3), delta_stats_ref(weight, reference, eta=1e-3)
    torch.testing.assert_close(found.delta_sq, truth.delta_sq, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weight_sq, truth.weight_sq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 4, 3)), ((3, 4), (3, 4))])
def test_other_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(TensorError, match="expected two stacks of one shape"):
        delta_stats(torch.zeros(shapes[0]), torch.zeros(shapes[1]), eta=1e-3)


@pytest.mark.parametrize("out", [torch.empty(2, 3, 5), torch.empty(2, 3, 4, dtype=torch.bfloat16)])
def test_a_place_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    w = torch.zeros(2, 3, 4)
    with pytest.raises(TensorError, match="expected an out of shape"):
        delta_stats(w, w, eta=1e-3, out=out)
