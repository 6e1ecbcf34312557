"""One-sided Jacobi: the source of csrc/cuda on the host, and the Triton kernel in its interpreter (another process)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from interpreter_run import run_interpreted
from jacobi_cases import F32, F64, basis, matrices, special, worst
from solver_toys import host_jacobi, in_order
from torch import Tensor

from rlspec.linalg import solvers
from rlspec.linalg.jacobi import Rotated
from rlspec.ops.reference import jacobi_ref


@pytest.fixture(autouse=True)
def _ordered() -> Iterator[None]:
    with in_order(0):
        yield


def rotated(g: Tensor, v: Tensor | None = None, **options: int) -> Rotated:
    return host_jacobi().library.rotate(g, v, **options)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("jacobi.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_largest_tile_is_what_the_solver_says() -> None:
    from rlspec.kernels.configs import JACOBI

    assert max(tile for tile, _ in JACOBI) == solvers.most_columns("triton")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 70])
def test_against_lapack(n: int, dtype: torch.dtype) -> None:
    g, v = matrices(4, n, dtype), basis(4, n, dtype)
    for start in (None, v):
        found = rotated(g, start)
        assert found.status.tolist() == [0] * 4 and int(found.sweeps.max()) <= 15
        assert found.values.dtype == dtype and (found.right is None) == (start is None)
        assert worst(found, g, start) <= 2.0


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [6, 9, 20])
def test_of_every_kind_and_whatever_the_neighbours(n: int, dtype: torch.dtype) -> None:
    kinds = special(n, dtype)
    g = torch.stack([*kinds.values()])
    v = basis(len(g), n, dtype)
    found = rotated(g, v)
    assert found.status.tolist() == [0] * len(g) and worst(found, g, v) <= 2.0
    for i, name in enumerate(kinds):
        alone = rotated(g[i : i + 1], v[i : i + 1])
        assert torch.equal(alone.values[0], found.values[i]), name
        assert int(alone.sweeps) == int(found.sweeps[i]), name


def test_the_twin_is_the_decomposition_of_a() -> None:
    g, v = matrices(2, 6, F64), basis(2, 6, F64)
    s, left, right = jacobi_ref(g, v)
    assert right is not None
    torch.testing.assert_close((left.mT * s[:, None]) @ right @ v.mT, g.mT)


def test_what_cannot_be_done_is_told_of_its_matrix_alone() -> None:
    g = matrices(4, 5, F32)
    wanted = rotated(g)
    g[1, 2, 3], g[2, 0, 0] = torch.nan, 1e30
    found = rotated(g)
    assert found.status.tolist() == [0, 2, 2, 0] and found.sweeps.tolist()[1:3] == [0, 0]
    assert torch.equal(found.left[[0, 3]], wanted.left[[0, 3]])
    assert rotated(matrices(1, 9, F64), most_sweeps=2).status.tolist() == [1]


def test_the_check_sees_what_is_not_rotated_to_the_end() -> None:
    g = matrices(2, 9, F64)
    assert worst(rotated(g), g) <= 2.0
    assert not worst(rotated(g, most_sweeps=3), g) <= 2.0
