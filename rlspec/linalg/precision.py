"""The arithmetic that every public entry point computes in, whatever is switched on around the call.

People set switches for their training: TF32, reduced precision of float32 products, autocast, a default device, inference
mode. None of them may change what is computed here, nor how fast: a product that is less accurate than the bounds assume
makes them wide, and wide bounds send every matrix to the exact engine.

Two kinds: modes of the calling thread, and flags of the whole process (see :mod:`.flags`). What is not pinned changes no
result: the default dtype, as every tensor made here names its own, and ``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from rlspec.linalg.flags import Flag, flags

_DEVICES = ("cpu", "cuda", "xpu", "mps")  # that have autocast
_lock = threading.Lock()
_holders = 0  # calls that compute now, in all threads
_before: list[
    tuple[Flag, Any, Any]
] = []  # a flag, what it is pinned to, what it was before the first of them


@contextmanager
def pinned_arithmetic() -> Iterator[None]:
    """Compute in the dtypes of the tensors at hand, by the fastest route that keeps their accuracy; without gradients.

    Usable as a decorator too. Everything is as before afterwards, also upon an exception. The flags are process-wide, so
    another thread's products are float32 as well for the duration; they are set by the first of overlapping calls and
    put back by the last, except one that somebody else has set meanwhile.
    """
    with ExitStack() as stack:
        for mode in _thread_modes():
            stack.enter_context(mode)
        stack.enter_context(_process_flags())
        yield


def _thread_modes() -> list[AbstractContextManager[Any]]:
    """What this thread is to compute under; only what it does not already."""
    modes: list[AbstractContextManager[Any]] = []
    if torch.is_inference_mode_enabled():  # a basis made in it could not be trained against
        modes.append(torch.inference_mode(False))
    modes.append(torch.no_grad())
    modes += [torch.autocast(kind, enabled=False) for kind in _DEVICES if torch.is_autocast_enabled(kind)]
    if torch.get_default_device().type != "cpu":
        modes.append(torch.device("cpu"))
    return modes


@contextmanager
def _process_flags() -> Iterator[None]:
    global _holders
    with _lock:
        if _holders == 0:
            _pin()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _put_back()


def _pin() -> None:
    try:
        for flag in flags():
            wanted = flag.wanted()
            if flag.read() != wanted:
                _before.append((flag, wanted, flag.original()))
                flag.write(wanted)
    except BaseException:
        _put_back()
        raise


def _put_back() -> None:
    while _before:
        flag, wanted, original = _before.pop()
        if flag.read() == wanted:
            flag.write(original)
