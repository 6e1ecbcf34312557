"""Small matrices side by side, each computed by one thread.

BLAS and LAPACK divide one matrix among all threads, which meet at a barrier in each of some thousand calls. A small
matrix gains little from that, and where another process holds a core every barrier waits for it. Matrices of their own
need no barriers. One thread also sums in one order, so that bits do not depend on how many threads there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

R = TypeVar("R")

# Up to here two threads on one matrix are no faster than one thread on each of two.
SMALL_ENTRIES = 1 << 21
# Below this it is the interpreter that takes the time, and it runs one thread at a time.
_TINY_ENTRIES = 1 << 15


def is_small(entries: int) -> bool:
    """Whether a matrix on the CPU is computed by one thread: told by its size alone, so that its bits are."""
    return entries <= SMALL_ENTRIES


@contextmanager
def threads_for(entries: int) -> Iterator[None]:
    """Context for the work on one matrix, with as many threads as :func:`in_order` gives it."""
    threads = torch.get_num_threads()
    _set_threads(1 if is_small(entries) else threads)
    try:
        yield
    finally:
        _set_threads(threads)


def in_order(jobs: Iterable[tuple[int, Callable[[], R]]], most: int) -> Iterator[R]:
    """The results of jobs, in their order.

    Small jobs run side by side, each with one thread. Any other has all of torch's threads, and this thread, to itself.
    While results are handed out torch may be set to one thread; afterwards it has as many as before.

    Args:
        jobs: entries of the matrix at work, see :func:`is_small`, and the job. One is asked for when at most ``most``
            are running or waiting.
        most: small jobs that run at once; no more than torch has threads do.

    Raises:
        Exception: what a job raises, in its turn. Later ones may have run.
    """
    threads = torch.get_num_threads()
    most = max(1, min(most, threads))
    ahead = most if most > 1 else 0  # one more than run, so that none of them waits for this thread
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(most, thread_name_prefix="rlspec-matrix")
    try:
        for entries, job in jobs:
            if not is_small(entries):
                while waiting:
                    yield waiting.popleft().result()
                _set_threads(threads)
                result = job()
                del job  # and what it holds, before the next one is asked for
                yield result
                del result
                continue
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
    finally:
        pool.shutdown(cancel_futures=True)
        _set_threads(threads)


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
