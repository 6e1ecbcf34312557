"""Times on a device by its own events, variants interleaved call by call, and what the card itself does at its best."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlspec.backend import VARIABLE

Run = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Of variants by name: median seconds, and why one has none; for one in neither the time was over."""

    seconds: dict[str, float]
    failed: dict[str, str]


def told(error: Exception) -> str:
    """An error in one line."""
    said = str(error)
    return f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"


class Clock:
    """Times calls on a device: by events on CUDA, by the wall clock on a CPU, where the figures are a rehearsal."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device = device
        self.deadline = deadline  #: of time.monotonic; no call is begun after it

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def interleaved(self, variants: Mapping[str, Run], *, repeats: int = 7, seconds: float = 10.0) -> Times:
        """Median seconds of each variant: one call of each a round, in turning order, so that clocks and caches treat all
        alike. Two calls before compile and warm up; a round is the last where the time is over. One that raises is told
        and the others go on; after the deadline no call is begun."""
        taken: dict[str, list[float]] = {name: [] for name in variants}
        failed: dict[str, str] = {}

        def attempt(name: str, call: Callable[[Run], object]) -> None:
            if not self.late and name not in failed:
                try:
                    call(variants[name])
                except Exception as error:  # the others are worth knowing all the same
                    failed[name] = told(error)

        for name in variants:
            for _ in range(2):
                attempt(name, lambda run: run())
        names, ends = list(variants), time.monotonic() + seconds
        for turn in range(repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                attempt(name, lambda run, name=name: taken[name].append(self.once(run)))
            if time.monotonic() > ends:
                break
        found = {name: statistics.median(each) for name, each in taken.items() if each and name not in failed}
        return Times(found, failed)

    def once(self, run: Run) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)  # by itself an event is put into the current device's
        torch.cuda.synchronize(self.device)
        start.record(stream)
        run()
        end.record(stream)
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


def yardsticks(device: torch.device, size: int) -> dict[str, float]:
    """Bytes a second of a large copy, and flops a second of a large product in float32, TF32 and bfloat16."""
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
    times = Clock(device, float("inf")).interleaved(variants)
    if times.failed:  # nothing can be told as a share of these
        raise RuntimeError(f"yardsticks on {device}: {times.failed}")
    seconds = times.seconds
    rates = {name: 2.0 * size**3 / taken for name, taken in seconds.items() if name != "copy"}
    return {"copy": 2.0 * source.nbytes / seconds["copy"], **rates}


def _in_tf32(a: torch.Tensor) -> torch.Tensor:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return a @ a
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
