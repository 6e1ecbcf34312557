"""What a device sends to the host is solved matrix by matrix, a thread each: the same bits however many there are."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from pretend import pretend_device, to_pretend
from torch import Tensor

from rlspec.linalg import dense, workers
from rlspec.linalg.workers import by_matrix


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cores(count: int, w: int) -> Tensor:
    """Cores (L, w, w) float64, of which every other one is too ill-conditioned for the Gram route."""
    g = torch.Generator().manual_seed(0)
    a = torch.eye(w, dtype=torch.float64) + 0.01 * torch.randn(count, w, w, generator=g, dtype=torch.float64)
    a[1::2, :, -1] *= 1e-3
    return a


def grams(count: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    a = cores(count, w)
    return a, a.mT @ a, a @ a.mT


def diagonalising(core: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    lower = torch.linalg.cholesky(left)
    return (*dense.core_svd(lower @ core), right.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("solve", [dense.core_svd, dense.eigh, diagonalising])
def test_bits_do_not_depend_on_threads_and_are_those_of_one_at_a_time(solve: object) -> None:
    stacks = grams(5, 190) if solve is diagonalising else (grams(5, 190)[1],)
    torch.set_num_threads(1)
    singles = [solve(*(stack[i : i + 1] for stack in stacks)) for i in range(5)]  # type: ignore[operator]
    wanted = [torch.cat(parts) for parts in zip(*singles, strict=True)]
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found = by_matrix(solve, *stacks)  # type: ignore[arg-type]
        assert all(torch.equal(mine, right) for mine, right in zip(found, wanted, strict=True))
        assert torch.get_num_threads() == threads


def test_small_matrices_are_solved_at_the_same_time_and_nothing_is_recorded_for_gradients() -> None:
    torch.set_num_threads(2)
    both_there = threading.Barrier(2, timeout=20)

    def solve(a: Tensor) -> tuple[Tensor]:
        both_there.wait()  # never ends where one runs after the other
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        assert threading.current_thread() is not threading.main_thread()
        return (2 * a,)

    a = cores(4, 190)
    assert torch.equal(by_matrix(solve, a)[0], 2 * a)


@pytest.mark.parametrize("shape", [(1, 190, 190), (4, 60, 60), (3, 1500, 1500), (190, 190)], ids=str)
def test_one_alone_the_tiny_and_the_large_go_to_lapack_as_they_are(shape: tuple[int, ...]) -> None:
    torch.set_num_threads(2)
    seen = []

    def solve(a: Tensor) -> tuple[Tensor]:
        seen.append((tuple(a.shape), torch.get_num_threads(), threading.current_thread()))
        return (a,)

    a = torch.zeros(shape)
    assert by_matrix(solve, a)[0] is a
    assert seen == [(shape, 2, threading.main_thread())]


def test_what_one_raises_is_raised() -> None:
    torch.set_num_threads(2)

    def solve(a: Tensor) -> tuple[Tensor]:
        if float(a[0, 0, 0]) == 2.0:
            raise torch.linalg.LinAlgError("the third")
        return (a,)

    stack = torch.arange(4.0)[:, None, None].expand(4, 190, 190).contiguous()
    with pytest.raises(torch.linalg.LinAlgError, match="the third"):
        by_matrix(solve, stack)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("door", ["core_svd", "eigh", "on_host"])
def test_a_device_s_cores_are_dealt_in_one_transfer_and_a_cpu_s_are_not(
    door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    right = torch.linalg.eigh

    def counted(a: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(a))
        return right(a)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    a = cores(3, 190)
    a = a.mT @ a

    def solved(a: Tensor) -> tuple[Tensor, ...]:
        return dense.on_host(dense.core_svd, a) if door == "on_host" else getattr(dense, door)(a)

    wanted = solved(a)
    assert sizes == [3]
    sizes.clear()
    with pretend_device() as report:
        found = solved(to_pretend(a))
        assert len(report.syncs) == 1 and all(x.is_cuda for x in found)
        found = tuple(x.cpu() for x in found)
    assert sizes == [1, 1, 1]
    assert a[0].numel() > workers._TINY_ENTRIES
    for mine, theirs in zip(found[: 1 if door == "eigh" else 3], wanted, strict=door != "eigh"):
        torch.testing.assert_close(mine.abs(), theirs.abs(), rtol=0, atol=1e-9)
