"""The processes that share a training, and how they stay together when one of them fails.

All of them call the same gathers in the same order. So what goes wrong in one alone is kept until the others can be
told, and then ends the work in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from rlspec.errors import RlspecError

T = TypeVar("T")
_PATIENCE = timedelta(days=2)


class ProcessError(RlspecError):
    """What one process failed with, or several; raised in all of them alike."""


class GatherError(RuntimeError):
    """The processes cannot reach each other any more: one has died, or their group's time is out.

    No process knows then where the others are, so none can go on; the training itself could not either.
    """


@dataclass(frozen=True)
class Processes:
    """A group of torch.distributed, or this process alone. Methods return when all have called them."""

    number: int = 0  #: of this one
    count: int = 1
    group: Any = None  #: None is the default one, which the training uses too

    @classmethod
    def of_training(cls) -> Processes:
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def apart(self, timeout: timedelta | None = None) -> Processes:
        """The same processes with a group of their own, on the host; :meth:`close` it.

        Args:
            timeout: how long one waits there for the others; None: as long as torch does.

        What is said there never meets a collective of a forward pass that another process is still in: where one fails
        in it alone the others wait, and nobody takes its words for weights.
        """
        if self.count == 1:
            return self
        backend = "gloo" if dist.is_gloo_available() else None
        return replace(self, group=dist.new_group(backend=backend, timeout=timeout))

    @contextmanager
    def patient(self) -> Iterator[Processes]:
        """Context with the same processes, where those that are done wait for one that works for hours.

        The training's group would lose its patience, after ten minutes with NCCL. One that dies is noticed at once.

        Raises:
            ProcessError, GatherError: as :meth:`together`.
        """
        waiting = self.together(lambda: self.apart(_PATIENCE))
        failure: ProcessError | None = None
        try:
            yield waiting
        except ProcessError as error:  # in all alike; after any other nobody knows where the others are
            failure = error
        self.gathered(None)  # none closes it while another still reads there
        waiting.close()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Let go of a group of their own."""
        if self.group is not None and dist.is_initialized():  # else it went with the default one
            dist.destroy_process_group(self.group)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in their order.

        Raises:
            GatherError: another process is not there.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._reaching():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def first(self, value: Any) -> Any:
        """The value that the first process has; those of the others are not looked at.

        Raises:
            GatherError: another process is not there.
        """
        if self.count == 1:
            return value
        found = [value if self.number == 0 else None]
        with self._reaching():
            dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def agree(self, failure: str | None) -> None:
        """Go on only where none has failed.

        Args:
            failure: what this process failed with, see :func:`told`; None where all is well.

        Raises:
            ProcessError: one has failed; the same message in all.
        """
        raise_failures(self.gathered(failure))

    def together(self, work: Callable[[], T]) -> T:
        """Do one thing in all processes; what it gave this one.

        What talks to the other processes in ``work`` must fail in all alike, or in none.

        Raises:
            ProcessError: it failed in one process, in all of them.
            GatherError: a process is gone.
        """
        failure, found = None, []
        try:
            found.append(work())
        except GatherError:  # nobody knows where the others are
            raise
        except Exception as error:
            failure = told(error)
        self.agree(failure)
        return found[0]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise GatherError(f"the {self.count} processes lost each other: {error}") from error


def raise_failures(failures: list[str | None]) -> None:
    """Raise the first failure of those of all processes, if there is one.

    Raises:
        ProcessError: the same message wherever the failures are the same.
    """
    for number, failure in enumerate(failures):
        if failure is not None:
            alike = all(other == failure for other in failures)
            raise ProcessError(failure if alike else f"process {number} of {len(failures)}: {failure}")


def dealt(costs: Sequence[int], count: int) -> list[int]:
    """The process that does each task: the costliest goes first, to whoever has the least to do."""
    owners, load = [0] * len(costs), [0] * count
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = load.index(min(load))
        load[owners[task]] += costs[task]
    return owners


def told(error: Exception) -> str:
    """An error in one line; its type is named where it is none of rlspec's own."""
    name = "" if isinstance(error, RlspecError) else f"{type(error).__name__}: "
    return f"{name}{' '.join(str(error).split())}"
