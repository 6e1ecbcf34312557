"""What the benches share: the machine line, timing, peak memory, tables and plots."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def timed(run: Callable[[], Any], repeats: int, budget_seconds: float) -> tuple[list[float], Any]:
    """Seconds of up to ``repeats`` calls, fewer once the budget is spent (always one), and the last result."""
    taken: list[float] = []
    while True:
        began = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - began)
        if len(taken) >= repeats or sum(taken) + taken[-1] > budget_seconds:
            return taken, result


def gemm_peak(size: int = 2048) -> tuple[float, str]:
    """GFLOP/s of the fastest product this CPU does, the best of five, and its dtype: what "peak" means in the tables.

    Without hardware support bfloat16 products are hundreds of times slower than float32 ones, so each dtype is tried
    small first, and the large size is left to those that come near the fastest.
    """
    small = {dtype: _product_rate(dtype, 128, 3) for dtype in (torch.float32, torch.bfloat16)}
    near = [dtype for dtype, rate in small.items() if rate > 0.2 * max(small.values())]
    found = {dtype: _product_rate(dtype, size, 5) for dtype in near}
    best = max(found, key=lambda dtype: found[dtype])
    return found[best], str(best).removeprefix("torch.")


def _product_rate(dtype: torch.dtype, size: int, repeats: int) -> float:
    """GFLOP/s of the best of some square products."""
    a = torch.ones(size, size, dtype=dtype)
    a @ a
    taken, _ = timed(lambda: a @ a, repeats, 5.0)
    return 2 * size**3 / min(taken) / 1e9


def reset_peak_memory() -> None:
    """Start a new maximum for :func:`peak_memory_mib`, where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib() -> float:
    """The process's largest resident size since :func:`reset_peak_memory`, MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_watched(
    command: Sequence[object], environment: dict[str, str] | None = None
) -> tuple[float, float, str]:
    """Run a command; its seconds, its largest resident size in GiB (Linux), and what it printed.

    Raises:
        ClickException: it failed.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        child = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **(environment or {})},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        peak = 0
        while child.poll() is None:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
            time.sleep(0.02)
        taken = time.perf_counter() - began
        printed.seek(0)
        output = printed.read()
    if child.returncode:
        raise click.ClickException(f"{' '.join(map(str, command[:4]))} failed:\n{output}")
    return taken, peak / 2**20, output


def summary(taken: Sequence[float]) -> dict[str, float | int]:
    return {
        "median_seconds": statistics.median(taken),
        "min_seconds": min(taken),
        "max_seconds": max(taken),
        "repeats": len(taken),
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text; the first row is the head, the first column is left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_error_against_time(results: list[dict[str, Any]], path: Path) -> bool:
    """A log-log scatter, one panel a shape; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["shape"] for row in results))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for row in (r for r in results if r["shape"] == name):
            axis.loglog(row["median_seconds"], max(row["max_sine"], 1e-9), "o")
            axis.annotate(row["method"], (row["median_seconds"], max(row["max_sine"], 1e-9)), fontsize=7)
        axis.set(title=name, xlabel="seconds", ylabel="sine of the largest angle")
        axis.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True
