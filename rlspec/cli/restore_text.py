"""What `rlspec restore` prints: the plan, a progress bar, and a summary of what was done."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm

from rlspec.restore.dealt import shard_owners
from rlspec.restore.estimate import check_memory, expected_seconds, memory_bytes, plan_bytes
from rlspec.restore.options import ELEMENTWISE
from rlspec.restore.plan import Plan, Step
from rlspec.restore.report import MatrixReport, RestoreReport
from rlspec.restore.select import without_numbers

# From this share on, what rounding took away is worth a hint.
_LOST = 0.1


class Bar:
    """A bar with time left and throughput on a terminal; nothing elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Any = None

    def begin(self, steps: Sequence[Step]) -> None:
        if self._stream.isatty():
            total = sum(step.bytes for step in steps)
            self._bar = tqdm(
                total=total, unit="B", unit_scale=True, desc="restore", file=self._stream, smoothing=0.05
            )

    def step(self, step: Step) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(step.name[-40:], refresh=False)
            self._bar.update(step.bytes)

    def finishing(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str("copying the rest, syncing")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def plan_lines(plan: Plan, memory_gib: float) -> list[str]:
    """The table of --dry-run, its totals, and an estimate of the time."""
    check_memory(plan, memory_bytes(memory_gib))
    rows: list[tuple[str, ...]] = [("tensor", "shape", "dtype", "action", "directions", "bytes", "why")]
    rows += [_plan_row(step, plan) for step in plan.steps.values()]
    lines = [*_table(rows), "", *_totals(plan)]
    cached, cold = expected_seconds(plan)
    time = f"about {_duration(cold)}"
    if cold > 1.1 * cached and cold >= 1:
        time += f", or {_duration(cached)} if the base's decompositions are in the cache"
    return [*lines, f"estimated time (from a short measurement, give or take a factor of two): {time}"] + (
        [*plan.notes, *unmatched_lines(plan)]
    )


def unmatched_lines(plan: Plan) -> list[str]:
    """Matrices whose names no pattern knows, folded over their numbers; nothing where all are known."""
    if not plan.unmatched:
        return []
    lines = [
        f"not matched by name: {len(plan.unmatched)} matrices (a regular expression for --modules chooses them)"
    ]
    kinds = Counter(map(without_numbers, plan.unmatched))
    return lines + [f"  {count:>5} x {name}" for name, count in kinds.items()]


def passed_over_lines(plan: Plan) -> list[str]:
    """Matrices that were asked for and stay as they are all the same, and why."""
    found = Counter((without_numbers(name), reason) for name, reason in plan.passed_over.items())
    return [f"left as it is: {count} x {name}: {reason}" for (name, reason), count in found.items()]


def idle_lines(plan: Plan, count: int) -> list[str]:
    """How many of several processes have no shard to write; nothing where all have one."""
    owners = shard_owners(plan, count)
    idle = count - len({0, *owners.values()})
    return (
        [f"{idle} of the {count} processes have nothing to do: shards written: {len(owners)}"] if idle else []
    )


def report_lines(report: RestoreReport) -> list[str]:
    """A few lines for the terminal."""
    rows = report.matrices
    counts = Counter(row.module for row in rows)
    kinds = ", ".join(f"{module} {count}" for module, count in counts.items())
    lines = [f"restored {len(rows)} matrices ({kinds or 'none'}), kept {len(report.kept)} tensors"]
    if report.merged:
        lines[0] += f", merged the adapter into {len(report.merged)} more"
    if rows:
        if report.options["mode"] not in ELEMENTWISE:
            lines.append(f"directions per matrix        {_spread([row.k for row in rows], '{:.0f}')}")
        lines.append(
            f"change, of the tuned norm    {_spread([row.change_relative for row in rows], '{:.2%}')}"
        )
        lines += _rotation(rows)
        lost = [row.rounding_share for row in rows]
        lines.append(f"lost to rounding, of change  {_spread(lost, '{:.1%}')}")
        if statistics.median(lost) > _LOST:
            kept = (
                "a dequantised checkpoint keeps it"
                if rows[0].dtype.startswith("float8")
                else "--dtype float32 keeps it"
            )
            lines.append(
                f"  {rows[0].dtype} cannot hold a change this small; --rounding stochastic keeps it on average, {kept}"
            )
    lines += [f"{row.name}: {row.note}" for row in rows if row.note]
    if report.options["dtype"] == "float32":
        lines.append("restored matrices are float32; load with dtype=torch.float32, config.json is unchanged")
    if report.resumed:
        lines.append(f"{report.resumed} of them were done before the interruption")
    rate = report.bytes_written / max(report.seconds, 1e-9)
    lines.append(
        f"wrote {report.out}: {_size(report.bytes_written)} in {_duration(report.seconds)} ({_size(rate)}/s)"
    )
    return lines


def _rotation(rows: Sequence[MatrixReport]) -> list[str]:
    sines = [row.rotation_sine_rms for row in rows if row.rotation_sine_rms is not None]
    return [f"rotation undone, rms sine    {_spread(sines, '{:.2g}')}"] if sines else []


def _plan_row(step: Step, plan: Plan) -> tuple[str, ...]:
    directions = ""
    if step.action == "restore" and not plan.options.elementwise:
        whole = [min(shape) for _, shape in step.matrices()]
        labels = [p.name.removeprefix(step.name) for p in step.projections]
        rule = plan.options.to_dict()["rank"]
        directions = " ".join(
            f"{label}{rule if k is None else k}/{r}" for label, k, r in zip(labels, step.directions, whole)
        )
    stored = step.entry.dtype
    shape = "x".join(map(str, step.entry.shape)) or "scalar"
    action = {"restore": plan.options.mode if step.action == "restore" else ""}.get(step.action, step.action)
    return step.name, shape, stored, action, directions, f"{step.bytes:,}", step.reason


def _totals(plan: Plan) -> list[str]:
    counts = {
        action: len(plan.chosen(action)) for action in ("restore", "merge", "tied", "scale", "copy", "keep")
    }
    text = ", ".join(f"{action} {count}" for action, count in counts.items() if count)
    return [f"{len(plan.steps)} tensors: {text}; {_size(plan_bytes(plan))} to write"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = rows[0].index("bytes")
    return [
        "  ".join(
            cell.rjust(width) if i == right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _spread(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"median {form.format(statistics.median(values))}, {low} to {high}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
