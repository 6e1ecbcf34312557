"""Times on a device by its own events, variants interleaved call by call, and what the card itself does at its best."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from rlspec.backend import VARIABLE

Run = Callable[[], object]


class Clock:
    """Times calls on a device: by events on CUDA, by the wall clock on a CPU, where the figures are a rehearsal."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device = device
        self.deadline = deadline  #: of time.monotonic; a section that begins after it is left out

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def interleaved(
        self, variants: Mapping[str, Run], *, repeats: int = 7, seconds: float = 10.0
    ) -> dict[str, float]:
        """Median seconds of each variant: one call of each a round, in turning order, so that clocks and caches treat all
        alike. Two calls before compile and warm up; a round is the last where the time is over."""
        for run in variants.values():
            run()
            run()
        taken: dict[str, list[float]] = {name: [] for name in variants}
        names, ends = list(variants), min(time.monotonic() + seconds, self.deadline)
        for turn in range(repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                taken[name].append(self.once(variants[name]))
            if time.monotonic() > ends:
                break
        return {name: statistics.median(found) for name, found in taken.items()}

    def once(self, run: Run) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let ``name`` compute what has more than one implementation."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def yardsticks(clock: Clock, size: int) -> dict[str, float]:
    """Bytes a second of a large copy, and flops a second of a large product in float32, TF32 and bfloat16."""
    device = clock.device
    source = torch.ones(4 * size * size, dtype=torch.float32, device=device)
    goal = torch.empty_like(source)
    single = torch.randn(size, size, device=device)
    half = single.bfloat16()
    variants: dict[str, Run] = {
        "copy": lambda: goal.copy_(source),
        "float32": lambda: single @ single,
        "bfloat16": lambda: half @ half,
    }
    if device.type == "cuda":
        variants["tf32"] = lambda: _in_tf32(single)
    seconds = clock.interleaved(variants)
    rates = {name: 2.0 * size**3 / taken for name, taken in seconds.items() if name != "copy"}
    return {"copy": 2.0 * source.nbytes / seconds["copy"], **rates}


def _in_tf32(a: torch.Tensor) -> torch.Tensor:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return a @ a
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
