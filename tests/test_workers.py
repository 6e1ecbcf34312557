"""Small matrices side by side: in order, one thread each, and the same bits however many threads there are."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_toys import toy_model

import rlspec
from rlspec import SpectralBasis, SpectralTracker
from rlspec.errors import TensorError
from rlspec.linalg.workers import SMALL_ENTRIES, in_order, threads_for
from rlspec.restore import restore_matrix
from rlspec.restore.estimate import pool_bytes, side_by_side, working_bytes
from rlspec.restore.options import RestoreOptions
from rlspec.restore.plan import plan_restore
from rlspec.spectra.cache import cached_factors

SMALL, LARGE = SMALL_ENTRIES, SMALL_ENTRIES + 1


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_jobs_have_one_thread_and_run_together_and_others_have_all() -> None:
    both_there = threading.Barrier(2, timeout=20)

    def small() -> tuple[bool, int]:
        both_there.wait()  # never ends where one runs after the other
        return threading.current_thread() is threading.main_thread(), torch.get_num_threads()

    def large() -> tuple[bool, int]:
        return threading.current_thread() is threading.main_thread(), torch.get_num_threads()

    jobs = [(SMALL, small), (SMALL, small), (LARGE, large), (SMALL, small), (SMALL, small)]
    assert list(in_order(jobs, 2)) == [(False, 1), (False, 1), (True, 2), (False, 1), (False, 1)]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_and_few_jobs_are_asked_for_ahead() -> None:
    asked = []

    def jobs() -> Iterator[tuple[int, Callable[[], int]]]:
        for i in range(20):
            asked.append(i)
            yield SMALL, lambda i=i: i  # type: ignore[misc]

    for place, result in enumerate(in_order(jobs(), 2)):
        assert result == place
        assert len(asked) <= place + 3  # two that run, and one that waits


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("entries", [1, SMALL, LARGE])
def test_what_a_job_raises_comes_in_its_turn_and_threads_are_as_before(entries: int) -> None:
    def fail() -> int:
        raise TensorError("the second")

    results = in_order([(entries, lambda: 1), (entries, fail), (entries, lambda: 3)], 2)
    assert next(results) == 1
    with pytest.raises(TensorError, match="the second"):
        next(results)
    assert torch.get_num_threads() == 2
    left = in_order([(entries, lambda: 1), (entries, lambda: 2)], 2)
    next(left)
    left.close()
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("entries", "threads"), [(SMALL, 1), (LARGE, 2)])
def test_one_matrix_has_the_threads_that_it_has_among_others(entries: int, threads: int) -> None:
    with threads_for(entries):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def threads_of_new() -> int:
    """How many threads torch has in a thread that has not asked yet: what was set last in the process."""
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    asking.start()
    asking.join()
    return found[0]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("has_computed", [True, False])
def test_two_threads_of_a_process_leave_each_other_one_thread_for_each_matrix(has_computed: bool) -> None:
    def of_another() -> None:
        if has_computed:  # it knows of two threads, and not of one
            torch.get_num_threads()
        ready.set()
        begin.wait()
        done.append(list(in_order([(SMALL, threads_of_new)] * 3, 2)))
        with threads_for(SMALL):
            done.append([threads_of_new()])

    done: list[list[int]] = []
    ready, begin = threading.Event(), threading.Event()
    other = threading.Thread(target=of_another)
    other.start()
    ready.wait()
    mine = in_order([(SMALL, threads_of_new)] * 8, 2)
    found = [next(mine)]
    begin.set()
    other.join(0.3)  # as long as its own small jobs could take
    found += mine
    other.join()
    assert found == [1] * 8 and done == [[1] * 3, [1]]
    assert torch.get_num_threads() == threads_of_new() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_thread_of_a_loader_keeps_its_one_thread_and_ours_theirs() -> None:
    # As a DataLoader does that pins memory: for its own sake, and the whole process has it.
    loader = threading.Thread(target=torch.set_num_threads, args=(1,))
    loader.start()
    loader.join()
    assert (torch.get_num_threads(), threads_of_new()) == (2, 1)
    both_there = threading.Barrier(2, timeout=20)
    assert len(list(in_order([(SMALL, both_there.wait)] * 2, 2))) == 2
    assert (torch.get_num_threads(), threads_of_new()) == (2, 1)


@pytest.mark.usefixtures("two_threads")
def test_jobs_within_jobs_wait_for_nobody() -> None:
    def within() -> list[int]:
        with threads_for(SMALL):
            return list(in_order([(SMALL, torch.get_num_threads)] * 2, 2))

    results = in_order([(SMALL, within)] * 3, 2)
    assert next(results) == [1, 1]
    assert within() == [1, 1]  # while results are handed out
    assert list(results) == [[1, 1]] * 2
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_child_process_does_not_wait_for_a_thread_that_it_lacks() -> None:
    results = in_order([(SMALL, lambda: 1)] * 3, 2)
    holder = threading.Thread(target=next, args=(results,))
    holder.start()
    holder.join()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are threads
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # kills it where it waits
        os._exit(0 if list(in_order([(1, lambda: 1)], 1)) == [1] else 1)
    assert os.waitpid(child, 0)[1] == 0
    results.close()


@pytest.mark.usefixtures("two_threads")
def test_a_second_interrupt_leaves_as_many_threads_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(pool: ThreadPoolExecutor, **options: bool) -> None:
        ended(pool, **options)
        if pool._thread_name_prefix == "rlspec-matrix":
            raise KeyboardInterrupt

    ended = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", interrupted)
    results = in_order([(SMALL, lambda: 1)] * 3, 2)
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.close()
    assert torch.get_num_threads() == threads_of_new() == 2
    monkeypatch.undo()
    assert list(in_order([(SMALL, lambda: 1)], 2)) == [1]


def pair(folder: Path) -> tuple[Path, Path]:
    """A base and a tuned model whose matrices are large enough for BLAS to divide them among threads."""
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    base, tuned = toy_model(seed=1, **sizes), toy_model(seed=1, **sizes)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(2)
        for parameter in tuned.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=draw)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def restored(base: Path, tuned: Path, out: Path, threads: int) -> dict[str, bytes]:
    torch.set_num_threads(threads)
    rlspec.restore_checkpoint(base, tuned, out, cache_dir=out.with_name(f"cache-{threads}"))
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.usefixtures("two_threads")
def test_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    one, two = (restored(base, tuned, tmp_path / f"out-{n}", n) for n in (1, 2))
    assert one == two
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        basis = SpectralBasis.from_checkpoint(base, cache_dir=tmp_path / f"own-{threads}")
        rows.append(SpectralTracker(basis).measure(tuned, step=0).rows)
    assert rows[0] == rows[1]
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(256, 256, generator=draw)
    other = weight + 1e-3 * torch.randn(256, 256, generator=draw)
    results: list[Tensor] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(restore_matrix(weight, other, 0.2).weight)
    assert torch.equal(*results)


@pytest.mark.usefixtures("two_threads")
def test_as_many_at_once_as_the_memory_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(tmp_path)
    plan = plan_restore(base, tuned, RestoreOptions())
    work = max(working_bytes(step, plan) for step in plan.chosen("restore"))
    monkeypatch.setattr("rlspec.restore.estimate._SMALLEST_POOL", 0)
    seen = set()
    for share in range(1, 60):
        memory = work * share // 4 + (1 << 25)
        most = side_by_side(plan, memory)
        seen.add(most)
        # Several take more than one each: peaks of up to 1.35 times that were measured.
        assert most == 1 or 1.35 * most * work + pool_bytes(plan, memory) <= memory
    assert seen == {1, 2}
    assert side_by_side(plan, sys.maxsize) == torch.get_num_threads()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("names", ["q", "qk"])
def test_a_stack_alone_is_measured_by_this_thread(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: Any) -> Any:
        seen.append(threading.current_thread() is threading.main_thread())
        return right(*arguments)

    seen: list[bool] = []
    right = SpectralTracker._measured
    tensors = {
        f"model.layers.0.self_attn.{name}_proj.weight": torch.eye(8, 8 + i) for i, name in enumerate(names)
    }
    monkeypatch.setattr("rlspec.linalg.workers._TINY_ENTRIES", 0)
    here: list[bool] = []

    def decomposed(weight: Tensor, cache_dir: Any) -> Any:
        here.append(threading.current_thread() is threading.main_thread())
        return cached_factors(weight, cache_dir)

    monkeypatch.setattr("rlspec.spectra.basis.cached_factors", decomposed)
    tracker = SpectralTracker(SpectralBasis.from_tensors(tensors, modules=list(names)))
    assert here == ([True] if len(names) == 1 else [False, False])
    monkeypatch.setattr(SpectralTracker, "_measured", measured)
    assert len(tracker.measure(tensors, step=0).rows) == len(names)
    assert seen == ([True] if len(names) == 1 else [False, False])


def test_a_reader_has_room_for_all_stacks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(tmp_path)
    basis = SpectralBasis.from_checkpoint(base)
    size = 256 * 256 * 4
    for entries in (1, 3 * 256 * 256):  # a stack of one matrix, and of all of a kind
        monkeypatch.setattr("rlspec.spectra.room.STACK_ENTRIES", entries)
        held = size * (1 if entries == 1 else 3)
        for stacks in (1, 2, 3, 5, 9):
            room = held * stacks + (1 << 16)
            monkeypatch.setattr("rlspec.spectra.tracker.READ_AHEAD_BYTES", room)
            monkeypatch.setattr("rlspec.io.weights.READ_AHEAD_BYTES", room)
            before = torch.get_num_threads()
            torch.set_num_threads(8)
            try:
                assert SpectralTracker(basis).measure(tuned, step=0).rows
            finally:
                torch.set_num_threads(before)
