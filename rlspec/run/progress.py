"""What a running job shows: a bar with ETA on a terminal, otherwise one line per event."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """One bar per stage on a terminal; elsewhere (a file, a CI log) only :meth:`say` prints.

    Args:
        stream: where to; stderr by default, so that stdout holds the results alone.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._total = 0
        self._first = 0
        self._began = 0.0

    def start(self, stage: str, step: int, total: int) -> None:
        """Begin a stage of ``total`` steps of which ``step`` are done."""
        self.stop()
        self._total, self._first, self._began = total, step, time.perf_counter()
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=step, desc=stage, unit="step", file=self._stream, smoothing=0.1
            )

    def step(self, step: int, **figures: float) -> None:
        """``step`` steps are done."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
            self._bar.update(step - self._bar.n)

    def eta(self, step: int) -> str:
        """The time this stage still needs at its pace so far, as m:ss; empty before the first step."""
        done = step - self._first
        if done <= 0 or step >= self._total:
            return ""
        seconds = (time.perf_counter() - self._began) * (self._total - step) / done
        return eta_text(seconds)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def stop(self) -> None:
        """Close the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def eta_text(seconds: float) -> str:
    """The time that is left, as ``ETA m:ss``."""
    return f"ETA {int(seconds) // 60}:{int(seconds) % 60:02d}"
