"""jacobi: on the CPU against its twin, and the kernel in Triton's interpreter (another process)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreter_run import run_interpreted
from jacobi_cases import F32, F64, basis, matrices, special, worst
from torch import Tensor

from rlspec.errors import TensorError
from rlspec.ops import jacobi as operation
from rlspec.ops.jacobi import jacobi, tournament
from rlspec.ops.reference import jacobi_ref


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("jacobi.py")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 70])
def test_against_lapack(n: int, dtype: torch.dtype) -> None:
    g, v = matrices(4, n, dtype), basis(4, n, dtype)
    for start in (None, v):
        found = jacobi(g, start)
        assert found.status.tolist() == [0] * 4 and int(found.sweeps.max()) <= 15
        assert found.values.dtype == dtype and (found.right is None) == (start is None)
        assert worst(found, g, start) <= 2.0


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [6, 9, 20])
def test_of_every_kind_and_whatever_the_neighbours(n: int, dtype: torch.dtype) -> None:
    kinds = special(n, dtype)
    g = torch.stack([*kinds.values()])
    v = basis(len(g), n, dtype)
    found = jacobi(g, v)
    assert found.status.tolist() == [0] * len(g) and worst(found, g, v) <= 2.0
    for i, name in enumerate(kinds):
        alone = jacobi(g[i : i + 1], v[i : i + 1])
        assert torch.equal(alone.values[0], found.values[i]), name
        assert int(alone.sweeps) == int(found.sweeps[i]), name


def test_the_twin_is_the_decomposition_of_a() -> None:
    g, v = matrices(2, 6, F64), basis(2, 6, F64)
    s, left, right = jacobi_ref(g, v)
    assert right is not None
    torch.testing.assert_close((left.mT * s[:, None]) @ right @ v.mT, g.mT)


def test_everybody_meets_everybody_once() -> None:
    for players in (2, 4, 10, 64):
        rounds = tournament(players)
        assert len(rounds) == players - 1
        met = {(i, j) for partners in rounds for i, j in enumerate(partners)}
        assert len(met) == players * (players - 1) and all(i != j for i, j in met)
        assert all(partners[j] == i for partners in rounds for i, j in enumerate(partners))


def test_what_cannot_be_done_is_told_of_its_matrix_alone() -> None:
    g = matrices(4, 5, F32)
    wanted = jacobi(g)
    g[1, 2, 3], g[2, 0, 0] = torch.nan, 1e30
    found = jacobi(g)
    assert found.status.tolist() == [0, 2, 2, 0] and found.sweeps.tolist()[1:3] == [0, 0]
    assert torch.equal(found.left[[0, 3]], wanted.left[[0, 3]])
    assert jacobi(matrices(1, 9, F64), most_sweeps=2).status.tolist() == [1]


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0)])
def test_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    found = jacobi(torch.zeros(shape), torch.zeros(shape))
    assert found.right is not None and found.left.shape == found.right.shape == shape
    assert found.values.shape == shape[:2] and found.status.tolist() == [0] * shape[0]


@pytest.mark.parametrize(
    ("g", "v", "message"),
    [
        (torch.zeros(3, 3), None, r"stack \(b, n, n\), found \(3, 3\)"),
        (torch.zeros(1, 3, 4), None, r"found \(1, 3, 4\)"),
        (torch.zeros(1, 3, 3).half(), None, "float16"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3).double(), "a V of shape .* torch.float64"),
        (torch.zeros(1, 3, 3), torch.zeros(2, 3, 3), "a V of shape"),
    ],
)
def test_refusals(g: Tensor, v: Tensor | None, message: str) -> None:
    with pytest.raises(TensorError, match=message):
        jacobi(g, v)


def test_the_check_sees_a_faulty_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both partners of columns of one length turned the same way: the matrix is no longer rotated."""
    right = operation._rotation

    def wrong(*given: Tensor) -> tuple[Tensor, ...]:
        sine, half, cosines = right(*given)  # type: ignore[arg-type]
        return torch.where(sine.abs() > 0.7, sine.abs(), sine), half, cosines

    g = special(6, F64)["columns of one length"][None]
    assert worst(jacobi(g), g) <= 2.0
    monkeypatch.setattr(operation, "_rotation", wrong)
    assert not worst(jacobi(g), g) <= 2.0
