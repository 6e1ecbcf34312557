"""Small matrices side by side, each computed by one thread.

BLAS and LAPACK divide one matrix among all threads, which meet at a barrier in each of some thousand calls. A small
matrix gains little from that, and where another process holds a core every barrier waits for it. Matrices of their own
need no barriers. One thread also sums in one order, so that bits do not depend on how many threads there are.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from rlspec.backend import interpreting
from rlspec.linalg.precision import pinned_arithmetic

R = TypeVar("R")

# Up to here two threads on one matrix are no faster than one thread on each of two.
SMALL_ENTRIES = 1 << 21
# Below this it is the interpreter that takes the time, and it runs one thread at a time.
_TINY_ENTRIES = 1 << 15

# How many threads BLAS has is a setting of the whole process: where two threads of it compute small matrices at a time,
# the first to be done would set it for the other's. They take turns.
_turn = threading.Lock()
_holder: int | None = None  # the thread whose turn it is
_of_pool = threading.local()  # has ``is_worker`` in a thread that computes for the holder


def _forget_turn() -> None:
    """A child process has none of its parent's threads, and nobody to wait for."""
    global _turn, _holder
    _turn, _holder = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_turn)


def is_small(entries: int) -> bool:
    """Whether a matrix on the CPU is computed by one thread: told by its size alone, so that its bits are."""
    return entries <= SMALL_ENTRIES


@contextmanager
def threads_for(entries: int) -> Iterator[None]:
    """Context for the work on one matrix, with as many threads as :func:`in_order` gives it."""
    with ExitStack() as stack:
        if is_small(entries):
            stack.enter_context(_one_thread())
        yield


@contextmanager
def _one_thread() -> Iterator[int]:
    """Context in which torch has one thread, and no other call changes that. Yields how many it had."""
    global _holder
    if _holder == threading.get_ident() or hasattr(_of_pool, "is_worker"):
        threads = torch.get_num_threads()
        _set_threads(1)
        try:
            yield threads
        finally:
            _set_threads(threads)
        return
    with _turn:
        # What this thread has is what the process had when the thread first computed, or set it: another's turn, or a
        # loader's thread that has one to itself, may have changed that since. Both are put back.
        threads, of_process = torch.get_num_threads(), _in_new_thread(torch.get_num_threads)
        try:
            _holder = threading.get_ident()
            torch.set_num_threads(1)
            yield max(threads, of_process)
        finally:
            _holder = None
            torch.set_num_threads(threads)
            if of_process != threads:
                _in_new_thread(lambda: torch.set_num_threads(of_process))


def _in_new_thread(call: Callable[[], R]) -> R:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def in_order(jobs: Iterable[tuple[int, Callable[[], R]]], most: int) -> Iterator[R]:
    """The results of jobs, in their order.

    Small jobs run side by side, each with one thread. Any other has all of torch's threads, and this thread, to itself.
    While results are handed out torch may be set to one thread, and small jobs of other threads may wait for these to be
    done; afterwards it has as many as before.

    Args:
        jobs: entries of the matrix at work, see :func:`is_small`, and the job. One is asked for when at most ``most``
            are running or waiting.
        most: small jobs that run at once; no more than torch has threads do, and one with Triton's interpreter, which
            knows of one kernel at a time.

    Raises:
        Exception: what a job raises, in its turn. Later ones may have run.
    """
    waiting: deque[Future[R]] = deque()
    with ExitStack() as stack:
        pool: ThreadPoolExecutor | None = None
        threads = ahead = 0
        for entries, job in jobs:
            if not is_small(entries):
                while waiting:
                    yield waiting.popleft().result()
                if pool is not None:
                    _set_threads(threads)
                result = job()
                del job  # and what it holds, before the next one is asked for
                yield result
                del result
                continue
            if pool is None:
                threads = stack.enter_context(_one_thread())
                most = 1 if interpreting() else max(1, min(most, threads))
                # One more than run, so that none of them waits for this thread.
                ahead = most if most > 1 else 0
                pool = ThreadPoolExecutor(most, "rlspec-matrix", initializer=_begin)
                stack.callback(pool.shutdown, cancel_futures=True)
            _set_threads(1)  # what the workers, too, begin with
            if most == 1 or entries <= _TINY_ENTRIES:
                waiting.append(_done(job))
            else:
                waiting.append(pool.submit(job))
            del job
            while len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def by_matrix(solve: Callable[..., tuple[Tensor, ...]], *stacks: Tensor) -> tuple[Tensor, ...]:
    """``solve(*stacks)`` of what a device sent to the host, small matrices side by side.

    LAPACK takes a batch one after the other, each with all threads. One matrix alone, and large ones, have those still;
    the tiny ones of a batch are done before a thread has begun.

    Args:
        solve: takes and returns tensors that begin with the stack's axis; no matrix minds its neighbours.
        stacks: (L, ...) on the CPU; the first tells how large a matrix is.
    """
    count, entries = len(stacks[0]), stacks[0][:1].numel()
    if stacks[0].ndim != 3 or count < 2 or entries <= _TINY_ENTRIES or not is_small(entries):
        return solve(*stacks)

    @pinned_arithmetic()  # which a thread of its own does not inherit
    def one(i: int) -> tuple[Tensor, ...]:
        return solve(*(stack[i : i + 1] for stack in stacks))

    found = list(in_order(((entries, partial(one, i)) for i in range(count)), count))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _begin() -> None:
    _of_pool.is_worker = True


def _done(job: Callable[[], R]) -> Future[R]:
    future: Future[R] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future


def _set_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
