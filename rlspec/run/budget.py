"""How much of the time of a training or a run its tracking may take."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlspec.errors import OptionError

_PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*%")
_FRACTION = re.compile(r"0?\.\d+")  # a text "1" could mean either


def parse_budget(budget: str | float | None, name: str = "budget") -> float | None:
    """A share of the time in (0, 1], from ``"1%"``, ``0.01`` or ``"0.01"``; None is no limit.

    Args:
        name: the argument's, for the error.

    Raises:
        OptionError: anything else.
    """
    if budget is None:
        return None
    share: object = budget
    if isinstance(budget, str):
        text = budget.strip()
        if match := _PERCENTAGE.fullmatch(text):
            share = float(match[1]) / 100
        elif _FRACTION.fullmatch(text):
            share = float(text)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise OptionError(f"{name}={budget!r} is not valid: give a share of the time such as '1%' or 0.01")
    return float(share)


class Pace:
    """Times what tracking takes, and tells whether there is time for another measurement.

    ``spent`` are the seconds that it took in all, ``last`` those of the last measurement.

    Args:
        share: of the time since :meth:`begin` that tracking may take; None is no limit.
        clock: seconds from any moment on.
    """

    def __init__(self, share: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share = share
        self._clock = clock
        self.begin()

    def begin(self, *, elapsed: float = 0.0, spent: float = 0.0, last: float = 0.0) -> None:
        """The training begins, or goes on: seconds ``elapsed`` before, ``spent`` of them, ``last`` the measurement."""
        self._began = self._clock() - elapsed
        self.last = last
        self.spent = spent

    @property
    def elapsed(self) -> float:
        """Seconds since the training began, tracking included."""
        return self._clock() - self._began

    @contextmanager
    def spending(self, *, once: bool = False) -> Iterator[None]:
        """Context for what tracking does; ``once``: it will not be done again, so it says nothing of what comes."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            self.spent += seconds
            if not once:
                self.last = seconds

    def allows(self) -> bool:
        """Whether the share would still be kept after a measurement that takes as long as the last one did."""
        return self.share is None or self.spent + self.last <= self.share * (self.elapsed + self.last)
