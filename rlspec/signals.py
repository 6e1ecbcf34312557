"""Ctrl-C and SIGTERM, which clusters send before they take a machine away: both ask to stop, and stop alike."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C: whatever cleans up after that one does after this one."""


def interrupt(number: int) -> KeyboardInterrupt:
    """The exception for a signal."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def signal_of(stop: KeyboardInterrupt) -> int:
    """The signal for an exception."""
    return signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT


@contextmanager
def handling(handler: Handler, *numbers: int) -> Iterator[None]:
    """Context in which ``handler`` has these signals; outside the main thread, where Python allows none, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Context in which SIGTERM raises :class:`Terminated`, as Ctrl-C raises KeyboardInterrupt."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise interrupt(number)

    with handling(handle, signal.SIGTERM):
        yield
