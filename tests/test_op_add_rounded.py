"""add_rounded against its twin: the nearest neighbour of the exact sum, and what the sums say of it."""

from __future__ import annotations

import sys

import pytest
import torch

from rlspec.ops.add_rounded import add_rounded
from rlspec.ops.reference import add_rounded_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [10, 1 << 17])
def test_the_nearest_neighbour(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(sys.modules["rlspec.ops.add_rounded"], "_BLOCK", block)
    tuned = torch.randn(37, 21).to(dtype)
    # Changes of every size beside a unit in the last place, exact ties among them.
    unit = (torch.nextafter(tuned, torch.full_like(tuned, torch.inf)).double() - tuned.double()).abs()
    change = (
        unit * torch.tensor([0.0, 0.25, -0.5, 0.5, 1.5, -3.0, 40.3])[torch.arange(37 * 21).view(37, 21) % 7]
    )
    weight, sums = add_rounded(tuned, change, 1.0, dtype)
    truth = add_rounded_ref(tuned, change, 1.0, dtype)
    assert weight.dtype == dtype and torch.equal(weight, truth)
    moved = truth.double() - tuned.double()
    assert sums.entries_changed == int(moved.count_nonzero())
    for found, exact in (
        (sums.change_sq, change.square().sum()),
        (sums.lost_sq, (moved - change).square().sum()),
        (sums.tuned_sq, tuned.double().square().sum()),
    ):
        assert found == pytest.approx(exact.item(), rel=1e-12, abs=1e-300)


def test_the_twin_sees_a_sum_that_is_rounded_twice() -> None:
    """By way of float32, 1 + 2^-8 + 2^-30 lands on a tie of bfloat16, and falls to the wrong side."""
    tuned = torch.ones(1, 1, dtype=torch.bfloat16)
    change = torch.full((1, 1), 2.0**-8 + 2.0**-30, dtype=torch.float64)
    twice = (tuned.double() + change).float().bfloat16()
    truth = add_rounded_ref(tuned, change, 1.0, torch.bfloat16)
    assert truth.item() == 1 + 2.0**-7 and twice.item() == 1.0
