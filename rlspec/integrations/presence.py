"""Whether all processes of a training have the callback, and with the same arguments.

The first is asked where nobody waits for a process that has none. A collective would: the others are in the training's
own by then. So each process signs in at the store that the group was made with, and the first that has waited long enough
closes the list. What is decided there is the same for all, latecomers too, since the store writes a decision once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from rlspec.errors import OptionError
from rlspec.spectra.processes import GatherError, Processes

#: Seconds that one waits for the others at most; they may be reading a checkpoint, or logging in to a service.
PATIENCE_S = 120.0
_HERE, _ABSENT = b"here", b"absent"
_last = 0  # question that this process has asked


@dataclass(frozen=True)
class Presence:
    all_here: bool
    #: whether this process was the first to sign in, which can speak for those that have
    speaks: bool


def ask(processes: Processes) -> Presence:
    """Ask it in every process that has the callback, which all ask as often.

    Returns:
        The same ``all_here`` in all of them. It is True where there is no store to ask at, too.

    Raises:
        GatherError: the store is gone, and with it the process that holds it.
    """
    store = _store() if processes.count > 1 else None
    if store is None:
        return Presence(True, processes.number == 0)
    try:
        return _ask(store, processes.count)
    except RuntimeError as error:
        raise GatherError(f"the {processes.count} processes lost each other: {error}") from error


def same_arguments(processes: Processes, arguments: Mapping[str, str]) -> None:
    """Called in all processes: each would else take its own way through what they do together.

    Args:
        arguments: by name, as the error shall show them.

    Raises:
        OptionError: in all processes: they have not the same.
        GatherError: a process is gone.
    """
    first, *others = processes.gathered(dict(arguments))
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise OptionError(
                    f"{name}= is {value} in process 0 and {other[name]} in process {number}; give all the same"
                )


def _ask(store: Any, count: int) -> Presence:
    global _last
    _last += 1
    # One that was closed without this process is of an earlier training, in which it had no callback. (Processes that
    # torchrun starts again may find the decisions of those before them. "Here" among them: as if nobody asked.)
    while _decided(store, _last) == _ABSENT:
        _last += 1
    decision = _decision(_last)
    place = store.add(f"{decision}/signed", 1)
    if place >= count:
        store.compare_set(decision, "", _HERE.decode())
    # The group's collectives must not run out of time while one waits here.
    end = time.monotonic() + min(PATIENCE_S, store.timeout.total_seconds() / 2)
    pause = 0.005
    try:
        while not store.check([decision]) and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
    finally:  # also where Ctrl-C ends the waiting
        decided = store.compare_set(decision, "", _ABSENT.decode())
    return Presence(decided == _HERE, place == 1)


def _decision(number: int) -> str:
    return f"rlspec/callback/{number}"


def _decided(store: Any, number: int) -> bytes | None:
    decision = _decision(number)
    return store.get(decision) if store.check([decision]) else None


def _store() -> Any:
    """The one that the default group was made with, where this release of torch tells it."""
    found = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if found is None else found()
