"""add_rounded against its twin: the nearest neighbour of the exact sum, and what the sums say of it."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from interpreter_run import run_interpreted

from rlspec.ops.add_low_rank import LowRank, add_low_rank
from rlspec.ops.add_rounded import add_rounded
from rlspec.ops.draws import Draws
from rlspec.ops.reference import add_low_rank_ref, add_rounded_ref


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("add_rounded.py")


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


def test_draws_follow_from_key_and_place() -> None:
    whole = Draws((3, -4)).uniform(0, 11, 21)
    assert torch.equal(torch.cat([Draws((3, -4)).uniform(i, 1, 21) for i in range(11)]), whole)
    assert torch.equal(Draws((3, -4)).uniform(0, 11, 20), whole[:, :20])
    assert not bool((Draws((3, -5)).uniform(0, 11, 21) == whole).any())
    assert float(whole.min()) > 0 and float(whole.max()) < 1


def test_draws_are_philox_of_the_counter() -> None:
    """Against NumPy's generator, asked for the counter itself: its first number is of the next one."""
    found = Draws((3, -4)).uniform(5, 1, 24)[0] * 2**32 - 0.5
    for counter in range(3):  # three a row
        key = np.array([3, -4]).astype(np.uint64)
        words = np.random.Philox(key=key, counter=5 * 3 + counter - 1).random_raw(4)
        halves = [float(half) for word in words for half in (int(word) & 0xFFFFFFFF, int(word) >> 32)]
        assert found[counter * 8 : counter * 8 + 8].tolist() == halves


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_random_rounding_takes_neighbours_and_is_right_on_average(dtype: torch.dtype) -> None:
    tuned = torch.full((400, 250), -1.5, dtype=dtype)
    step = 0.3 * torch.finfo(dtype).eps
    weight, sums = add_rounded(
        tuned, torch.full((400, 250), step, dtype=torch.float64), 1.0, dtype, draws=Draws((1, 2))
    )
    moved = (weight.double() - tuned.double()) / torch.finfo(dtype).eps
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert abs(float(moved.mean()) - 0.3) <= 5 * (0.3 * 0.7 / moved.numel()) ** 0.5
    assert sums.entries_changed == int(moved.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [100, 1 << 21])
def test_a_low_rank_change(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(sys.modules["rlspec.ops.add_low_rank"], "_BLOCK", block)
    tuned = torch.randn(37, 21).to(dtype)
    change = LowRank(torch.randn(37, 5, dtype=torch.float64), torch.randn(21, 5, dtype=torch.float64))
    weight, sums = add_low_rank(tuned, change, 0.25, dtype)
    exact = add_low_rank_ref(tuned, change.left, change.right, 0.25)
    half = torch.finfo(dtype).eps / 2
    assert bool(
        (
            (weight.double() - exact).abs() <= half * exact.abs() + 1e-7 * (dtype != torch.float64) + 1e-15
        ).all()
    )
    assert sums.frobenius == pytest.approx(float(0.25 * change.dense().norm()), rel=1e-12)
    moved = weight.double() - tuned.double()
    assert sums.lost_sq == pytest.approx(float((moved - 0.25 * change.dense()).square().sum()), rel=1e-9)
