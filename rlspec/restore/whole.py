"""Tensors of a checkpoint that are held whole: read in pairs, and restored, small ones several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from rlspec.errors import TensorError
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.workers import in_order
from rlspec.restore.codes import Side, StoredWeights, restore_codes
from rlspec.restore.estimate import entries_at_once, pool_bytes, side_by_side
from rlspec.restore.plan import Plan, Step
from rlspec.restore.report import MatrixReport
from rlspec.restore.tensors import NotFiniteError, converted, restore_stored


@dataclass(frozen=True)
class Restored:
    """What a step gives: the tensor to store, its new scale where that is codes, and a report of each matrix."""

    weight: Tensor
    scale: Tensor | None
    rows: list[MatrixReport]


def restore_whole(
    plan: Plan, steps: list[Step], memory: int, cache_dir: Path | None
) -> Iterator[tuple[Step, Restored]]:
    """Carry out steps whose tensors are held whole, in order.

    Args:
        memory: bytes for tensors and decompositions; as many small matrices as fit are worked on at once.

    Raises:
        TensorError: NaN or infinity in a matrix; names it and its file.
    """
    most = side_by_side(plan, memory)
    results = in_order(_jobs(plan, steps, pool_bytes(plan, memory), cache_dir), most)
    yield from zip(steps, results, strict=True)


def _jobs(
    plan: Plan, steps: list[Step], pool: int, cache_dir: Path | None
) -> Iterator[tuple[int, Callable[[], Restored]]]:
    there, here = StoredWeights(plan.base), StoredWeights(plan.like)
    for name, base, tuned in _pairs(plan, [step.name for step in steps], pool):
        step = plan.steps[name]
        sides: list[Side] = [base, tuned]
        if step.dequantised and step.action != "merge":
            with file_named(plan, step):
                sides = [there.side(name, base), here.side(name, tuned)]
        del base, tuned  # their buffers go back to the reader when the job is done with them
        yield entries_at_once(step, plan), partial(_restore, plan, step, sides, cache_dir)
        del sides


@pinned_arithmetic()
def _restore(plan: Plan, step: Step, sides: list[Side], cache_dir: Path | None) -> Restored:
    """Do one step. Takes the two sides out of the list, so that only this call holds them."""
    tuned, base = sides.pop(), sides.pop()
    with file_named(plan, step):
        if step.dequantised and step.action != "merge":
            return Restored(*restore_codes(step, base, tuned, plan.options, cache_dir))
        assert isinstance(base, Tensor) and isinstance(tuned, Tensor)
        if step.action == "merge":
            return Restored(converted(step.name, tuned, step.dtype or tuned.dtype, plan.options), None, [])
        weight, rows = restore_stored(step, base, tuned, plan.options, cache_dir)
        return Restored(weight, None, rows)


@contextmanager
def file_named(plan: Plan, step: Step) -> Iterator[None]:
    """Say in which file the tensor lies that an error is about."""
    try:
        yield
    except TensorError as error:
        file = step.entry.shard if plan.adapter is None else plan.adapter.index.path
        if isinstance(error, NotFiniteError) and error.side == "base":
            file = plan.base.tensors[step.name].shard
        raise TensorError(f"{file}: {error}") from None


def _pairs(plan: Plan, names: list[str], memory: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, base, tuned) in the order asked for; an adapter's tuned tensors are formed from the base's."""
    from rlspec.io.stream import TensorStream, read_tensor, stream_pairs

    if plan.model is not None:
        yield from plan.model.pairs(plan.base, names, memory_bytes=memory)
        return
    if plan.adapter is None:
        yield from stream_pairs(plan.base, plan.like, names, memory_bytes=memory)
        return
    with TensorStream(plan.base, names, memory_bytes=memory) as stream:
        for streamed in stream:
            name = streamed.entry.name
            base = streamed.tensor
            saved = plan.adapter.saved(name)
            rows = base if saved is None else read_tensor(plan.adapter.index, saved)
            tuned = plan.adapter.add_update(name, 0, rows)
            del streamed, rows
            yield name, base, tuned
            del base, tuned
