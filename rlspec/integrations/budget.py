"""How much of a training's time its tracking may take."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlspec.errors import OptionError

_PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*%")


def parse_budget(budget: str | float | None) -> float | None:
    """A share of the time in (0, 1], from ``"1%"`` or ``0.01``; None is no limit.

    Raises:
        OptionError: anything else.
    """
    if budget is None:
        return None
    match = _PERCENTAGE.fullmatch(budget.strip()) if isinstance(budget, str) else None
    share = float(match[1]) / 100 if match else budget
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise OptionError(f"budget={budget!r} is not valid: give a share of the time such as '1%' or 0.01")
    return float(share)


class Pace:
    """Times what tracking takes, and tells whether there is time for another measurement.

    Args:
        share: of the time since :meth:`begin` that tracking may take; None is no limit.
        clock: seconds from any moment on.
    """

    def __init__(self, share: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share = share
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """The training begins: nothing is spent yet."""
        self._began = self._clock()
        self._last = 0.0
        self.spent = 0.0

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
                self._last = seconds

    def allows(self) -> bool:
        """Whether the share would still be kept after a measurement that takes as long as the last one did."""
        return self.share is None or self.spent + self._last <= self.share * (self.elapsed + self._last)
