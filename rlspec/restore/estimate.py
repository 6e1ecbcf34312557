"""How much memory and time a restoration takes: bounds for the first, an estimate for the second."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from math import prod
from numbers import Real

import torch

from rlspec.errors import OptionError, check_type
from rlspec.io.index import TensorEntry
from rlspec.linalg.dense import eigh
from rlspec.linalg.workers import is_small
from rlspec.restore.plan import Plan, Step
from rlspec.restore.tensors import BLOCK_ENTRIES

# Float64 copies of the matrix, and of its smaller Gram matrix, that are held at the worst moment: a float64
# decomposition of the tuned matrix, which any matrix may turn out to need. Measured peaks of square and oblong
# matrices, and a tenth more.
_MATRIX_COPIES = 5.5
_GRAM_COPIES = 7.5
# Of several at once, each: a thread's heap keeps some of what is freed in it. Peaks of 2 and 8 matrices of 1024x1024 at
# once are up to 1.35 times what the copies come to.
_HEAP_SHARE = 1.4
# Of a matrix that is stored as codes: the numbers of both sides, and the result before it is codes again, in float32.
_DEQUANTISED_BYTES = 12
# A block of the elementwise modes: its float64 copies.
_BLOCK_COPIES = 10
# Row streams and pools get at least this.
_SMALLEST_POOL = 1 << 26
# What buffers take beyond their tensors.
_SLACK = 1 << 24


def streamed_by_rows(step: Step, plan: Plan) -> bool:
    """Whether a tensor goes through in row blocks: it is copied, merged or changed entry by entry, as one whole."""
    if step.action == "copy":
        return True
    if step.action == "merge":
        return bool(step.entry.shape)
    whole = all(p.rows is None and not p.transposed for p in step.projections)
    return plan.options.elementwise and whole and len(step.projections) == 1 and not step.dequantised


def working_bytes(step: Step, plan: Plan) -> int:
    """Memory for the computation on one tensor, beyond the pool that it is read into."""
    if _comes_whole(step, plan):
        return _BLOCK_COPIES * 8 * BLOCK_ENTRIES + _size(step.entry)
    if streamed_by_rows(step, plan):
        return _BLOCK_COPIES * 8 * BLOCK_ENTRIES
    whole = prod(step.entry.shape) * (4 if plan.adapter is not None else 0) + step.bytes
    if plan.model is not None:  # what its parts are put together in
        whole += _size(step.entry)
    if step.dequantised:
        whole += prod(step.entry.shape) * _DEQUANTISED_BYTES
    if plan.options.elementwise:
        return whole + _BLOCK_COPIES * 8 * BLOCK_ENTRIES
    matrices = (
        int(8 * (_MATRIX_COPIES * m * n + _GRAM_COPIES * min(m, n) ** 2)) for _, (m, n) in step.matrices()
    )
    return whole + max(matrices, default=0)  # a scalar that is merged has none


def entries_at_once(step: Step, plan: Plan) -> int:
    """Entries of the largest matrix that this process computes with for a step; see ``linalg.workers``."""
    if torch.device(plan.options.device).type != "cpu":
        return sys.maxsize  # one after the other
    return max((m * n for _, (m, n) in step.matrices()), default=prod(step.entry.shape))


def side_by_side(plan: Plan, memory: int) -> int:
    """How many steps of small matrices, held whole, are worked on at once: one at least, and what the bound allows."""
    work, pair = _small_step(plan)
    room = memory - _smallest_pool(plan) - 2 * pair - _SLACK
    return max(1, min(torch.get_num_threads(), room // (int(_HEAP_SHARE * work) + pair))) if pair else 1


def pool_bytes(plan: Plan, memory: int) -> int:
    """What the reader may hold: all that the largest computation leaves, up to four of the largest pairs."""
    work, pair = _small_step(plan)
    most = side_by_side(plan, memory)
    largest = max((working_bytes(step, plan) for step in _steps(plan)), default=0)
    together = int(_HEAP_SHARE * most * work) if most > 1 else work
    # Of small pairs there is one in each worker, one that waits and one that is being read.
    needed = max(_smallest_pool(plan), (most + 2) * pair + _SLACK)
    return max(needed, min(memory - max(largest, together), 2 * needed))


def _small_step(plan: Plan) -> tuple[int, int]:
    """Of the steps that run side by side, the most that one computes with, and the largest pair."""
    small = [
        step
        for step in _steps(plan)
        if not streamed_by_rows(step, plan) and is_small(entries_at_once(step, plan))
    ]
    return max((working_bytes(step, plan) for step in small), default=0), max(
        (_pair(plan, step) for step in small), default=0
    )


def memory_bytes(memory_gib: float) -> int:
    """The bound in bytes.

    Raises:
        OptionError: not a number above 0.
    """
    check_type("memory_gib", memory_gib, Real, "a number")
    if not (math.isfinite(memory_gib) and memory_gib > 0):
        raise OptionError(f"memory_gib={memory_gib} must be a number above 0")
    return int(memory_gib * 2**30)


def check_memory(plan: Plan, memory: int) -> None:
    """Refuse a bound that the largest tensor does not fit.

    Raises:
        OptionError: names the tensor and what it needs.
    """
    for step in sorted(_steps(plan), key=lambda s: working_bytes(s, plan), reverse=True)[:1]:
        needed = working_bytes(step, plan) + _smallest_pool(plan)
        if needed > memory:
            raise OptionError(
                f"{step.name} {list(step.entry.shape)}: restoring it takes about {needed / 2**30:.1f} GiB, "
                f"memory_gib={memory / 2**30:.1f} is too little: give memory_gib={needed / 2**30 + 0.05:.1f}, or choose "
                "modules without it"
            )


def _smallest_pool(plan: Plan) -> int:
    """Two of the largest pairs that are held whole: one in use, one being read."""
    whole = [step for step in _steps(plan) if not streamed_by_rows(step, plan) or _comes_whole(step, plan)]
    largest = max((_pair(plan, step) for step in whole), default=0)
    return max(_SMALLEST_POOL, 2 * largest + _SLACK)


def _comes_whole(step: Step, plan: Plan) -> bool:
    """Whether the tuned tensor is made of parts that are no rows of it, though it goes through in row blocks."""
    by_rows = streamed_by_rows(step, plan)
    return by_rows and plan.model is not None and not plan.model.comes_by_rows(step.name)


def _pair(plan: Plan, step: Step) -> int:
    return _size(plan.base.tensors[step.name]) + (0 if plan.adapter is not None else _size(step.entry))


def _size(entry: TensorEntry) -> int:
    return entry.end - entry.start


def _steps(plan: Plan) -> list[Step]:
    return plan.chosen("restore") + plan.chosen("merge") + plan.chosen("copy")


def expected_seconds(plan: Plan) -> tuple[float, float]:
    """A rough estimate of the time: with every base decomposition in the cache, and with none.

    It scales what two small decompositions and products take on this machine now, and counts two seconds for every
    GiB that is written.
    """
    size = 512
    square = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    symmetric = square @ square.mT
    product = _fastest(lambda: square @ square) / (2 * size**3)
    eigen = _fastest(lambda: eigh(symmetric)) / size**3
    cached = 2 * plan_bytes(plan) / 2**30
    cold = 0.0
    for step in plan.chosen("restore"):
        for (_, (m, n)), k in zip(step.matrices(), step.directions):
            r, long = min(m, n), max(m, n)
            if plan.options.elementwise:
                cached += 1250 * m * n * product
                continue
            decomposition = eigen * r**3 + product * 8 * long * r * r
            cold += decomposition
            leading = plan.options.part == "top" and not plan.options.exact
            cached += product * 12 * long * r * (k or r // 2) if leading else 2 * decomposition
    return cached, cached + cold


def plan_bytes(plan: Plan) -> int:
    """Size of the output's tensors."""
    return sum(step.bytes for step in plan.steps.values())


def _fastest(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)
