"""The public operations against their plain float64 twins."""

from __future__ import annotations

import pytest
import torch

from rlspec import ops
from rlspec.errors import TensorError
from rlspec.reference import delta_prep_ref


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 100, 1 << 18])
def test_delta_prep(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(ops, "_BLOCK", block)
    g = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 17, 33, generator=g, dtype=torch.float64).to(dtype)
    moved = reference.double() * (1 + 3e-3 * torch.randn(3, 17, 33, generator=g, dtype=torch.float64))
    moved[0] = reference[0].double()  # a matrix that did not move
    weight = moved.to(dtype)
    found, truth = ops.delta_prep(weight, reference, eta=1e-3), delta_prep_ref(weight, reference, eta=1e-3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.delta.dtype == wide
    if dtype != torch.float32:  # differences of 16-bit numbers are exact in float32
        assert torch.equal(found.delta.double(), truth.delta)
    torch.testing.assert_close(found.delta, (weight.to(wide) - reference.to(wide)), rtol=0, atol=0)
    for mine, exact in zip(found[1:4], truth[1:4], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-6 if wide == torch.float32 else 1e-14, atol=0)
    assert found.delta_sq[0] == 0
    assert found.unchanged[0] == 17 * 33
    if dtype != torch.float32:
        assert torch.equal(found.unchanged, truth.unchanged)
    assert bool((found.unchanged[1:] > 0).all()) and bool((found.unchanged[1:] < 17 * 33).all())


def test_delta_prep_takes_mixed_dtypes_and_strided_views() -> None:
    g = torch.Generator().manual_seed(1)
    reference = torch.randn(2, 9, 14, generator=g).bfloat16()
    weight = torch.randn(2, 14, 9, generator=g).mT
    found, truth = ops.delta_prep(weight, reference, eta=1e-3), delta_prep_ref(weight, reference, eta=1e-3)
    torch.testing.assert_close(found.delta.double(), truth.delta, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.weight_sq, truth.weight_sq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 4, 3)), ((3, 4), (3, 4))])
def test_delta_prep_refuses_other_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(TensorError, match="expected two stacks of one shape"):
        ops.delta_prep(torch.zeros(shapes[0]), torch.zeros(shapes[1]), eta=1e-3)
