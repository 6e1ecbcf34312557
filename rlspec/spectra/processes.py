"""The processes that share a training, and how they stay together when one of them fails.

All of them call the same gathers in the same order. So what goes wrong in one alone is kept until the others can be
told, and then ends the work in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from rlspec.errors import RlspecError


class ProcessError(RlspecError):
    """What one process failed with, or several; raised in all of them alike."""


class GatherError(RuntimeError):
    """The processes cannot reach each other any more: one has died, or their group's time is out.

    No process knows then where the others are, so none can go on; the training itself could not either.
    """


@dataclass(frozen=True)
class Processes:
    """The default group of torch.distributed, or this process alone. Methods return when all have called them."""

    number: int = 0  #: of this one
    count: int = 1

    @classmethod
    def of_training(cls) -> Processes:
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in their order.

        Raises:
            GatherError: another process is not there.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, value)
        except Exception as error:
            raise GatherError(f"the {self.count} processes lost each other: {error}") from error
        return found

    def first(self, value: Any) -> Any:
        """The value that the first process has; those of the others are not looked at."""
        return self.gathered(value if self.number == 0 else None)[0]

    def agree(self, failure: str | None) -> None:
        """Go on only where none has failed.

        Args:
            failure: what this process failed with, see :func:`told`; None where all is well.

        Raises:
            ProcessError: one has failed; the same message in all.
        """
        raise_failures(self.gathered(failure))


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
