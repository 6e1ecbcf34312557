"""Sketches of ±1 by counter: on the host against NumPy's own words, and the kernel in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from interpreter_run import run_interpreted

from rlspec.ops.chebyshev_step import sketch
from rlspec.ops.draws import Signs


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("signs.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_bits_of_philox(dtype: torch.dtype) -> None:
    """Entry (i, j) of matrix l: bit i % 32 of number j % 8 of the counter of its block, asked for by itself."""
    found = Signs((3, -4), (2, 70, 19)).dense(torch.ones(1, dtype=dtype))
    assert found.dtype == dtype and found.shape == (2, 70, 19)
    key = np.array([3, -4]).astype(np.uint64)
    for matrix, i, j in ((0, 0, 0), (0, 31, 7), (0, 32, 8), (1, 0, 0), (1, 69, 18), (1, 40, 3), (0, 5, 13)):
        counter = (matrix << 64) + i // 32 * 3 + j // 8  # three a row of blocks
        # NumPy counts before it draws.
        words = np.random.Philox(key=key, counter=(counter - 1) % (1 << 256)).random_raw(4)
        number = int(words[j % 8 // 2]) >> 32 * (j % 2) & 0xFFFFFFFF
        assert float(found[matrix, i, j]) == 1.0 - 2.0 * (number >> i % 32 & 1), (matrix, i, j)


def test_signs_are_even_and_of_no_pattern() -> None:
    """Products of different columns, of different rows and of different matrices are sums of n independent signs: none
    of 1.3 million of them passes 6 standard deviations, once in 400 draws of keys."""
    found = Signs((3, -4), (2, 800, 800)).dense(torch.ones(1, dtype=torch.float64))
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    off = 1.0 - torch.eye(800, dtype=torch.float64)
    for products in (
        (found[0].mT @ found[0]) * off,
        (found[0] @ found[0].mT) * off,
        found[0].mT @ found[1],
        found.sum(1),
    ):
        assert 3 * 800**0.5 < float(products.abs().max()) < 6 * 800**0.5


def test_keys_follow_from_the_generator_alone() -> None:
    one, same, other = (Signs.of(torch.Generator().manual_seed(seed), (1, 40, 9)) for seed in (0, 0, 1))
    assert one == same and one.key != other.key
    assert not torch.equal(one.dense(torch.ones(1)), other.dense(torch.ones(1)))


def test_a_sketch_without_columns_is_empty() -> None:
    """What is left to draw where a warm start has all columns."""
    assert sketch(lambda y: y, Signs((1, 2), (2, 40, 0)), torch.ones(1)).shape == (2, 40, 0)
