"""Which matrices are measured together, and the memory that this takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from rlspec.errors import OptionError
from rlspec.io.projections import Projection
from rlspec.linalg.rank import Rank
from rlspec.linalg.workers import is_small
from rlspec.perturb.reference import widest
from rlspec.spectra.room import stack_entries

# What is held at once where a stack (L, m, n) is decomposed and measured, in bytes for each of its L m n entries and for
# each of L c² more: weights, factors and updates here, what is computed of them there. Above the peaks counted, by the
# way that a matrix takes: sweeps of the delta engine, whose cores have c columns, or a full decomposition, which either
# engine may come to, with c = min(m, n).
_SWEEP_BYTES, _DECOMPOSITION_BYTES = (36, 200), (60, 60)
# A random update in float64, which the engine works on a narrower copy of, and the core of what was measured before.
_NULL_BYTES = (8, 8)
# For each entry of a stack whose subspaces are compared with others', which are held meanwhile: with every direction
# followed 3 numbers of float64, and 2 for their Gram matrices. The comparison needs less than the measurement before it.
_SUBSPACE_BYTES = 40
# A heap keeps some of what is freed in it, but for blocks so large that each has pages of its own (glibc: from 32 MiB,
# which a float32 matrix has from so many entries on). One matrix of 1024x1056 took 1.26 times what the bytes above come
# to, one of 2048x2112 1.3 times; of two side by side, in threads' heaps, each of 1024x1056 took 1.9 times.
_PAGED_ENTRIES = 1 << 23
_HEAP_SHARE, _THREAD_HEAP_SHARE = 1.35, 2.05


def stacks(
    projections: Sequence[Projection],
    shapes: Mapping[str, tuple[int, ...]],
    memory: int,
    memory_gib: float,
    *,
    rank: Rank,
    device: torch.device,
    parts: int = 1,
    locking: bool = False,
    nulls: bool = False,
) -> tuple[tuple[Projection, ...], ...]:
    """Matrices of one shape, in stacks that fit the memory, in the order of their first ones.

    Args:
        rank: the directions that are followed.
        device: where they are measured.
        parts: how many of a tracker's stacks of small matrices may make one, to be measured side by side.
        locking: whether their subspaces are compared with others'.
        nulls: whether random updates are drawn.
        memory: bound in bytes; ``memory_gib`` is what messages call it.

    Raises:
        OptionError: one matrix alone does not fit.
    """
    by_shape: dict[tuple[int, int], list[Projection]] = {}
    for projection in projections:
        by_shape.setdefault(projection.shape(shapes[projection.tensor]), []).append(projection)
    found = []
    for shape, members in by_shape.items():
        needed = partial(stack_bytes, shape, rank=rank, locking=locking, nulls=nulls)
        alone = needed(1)
        if alone > memory:
            raise OptionError(
                f"memory_gib={memory_gib} is too little: {members[0].name} ({shape[0]}x{shape[1]}) takes up to "
                f"{alone / 2**30:.2g} GiB to decompose and measure"
            )
        # As a tracker stacks them: a row is then the same as that of a tracker of the whole model.
        entries = shape[0] * shape[1]
        size = max(1, stack_entries(device) // max(1, entries))
        most = parts if is_small(entries) else 1
        each = _THREAD_HEAP_SHARE * held_bytes(shape, size, rank=rank, locking=locking, nulls=nulls)
        together = next((n for n in range(most, 1, -1) if n * each <= memory), 1)
        while size > 1 and needed(size) > memory:
            size -= 1
        size *= together
        found += [tuple(members[i : i + size]) for i in range(0, len(members), size)]
    return tuple(found)


def stack_bytes(
    shape: tuple[int, int], count: int, *, rank: Rank, locking: bool = False, nulls: bool = False
) -> int:
    """A bound on the memory, in bytes, that decomposing and measuring ``count`` matrices (m, n) takes at once."""
    share = _HEAP_SHARE if shape[0] * shape[1] < _PAGED_ENTRIES else 1.0
    return round(share * held_bytes(shape, count, rank=rank, locking=locking, nulls=nulls))


def held_bytes(
    shape: tuple[int, int], count: int, *, rank: Rank, locking: bool = False, nulls: bool = False
) -> int:
    """The same without what a heap keeps of freed memory: tensors, and what LAPACK works in."""
    r = min(shape)
    columns = r if rank.needs_values else widest(rank.resolve(r), r)
    more = [_NULL_BYTES] if nulls else []
    if locking:
        more.append((_SUBSPACE_BYTES, 0))

    def total(way: tuple[int, int], c: int) -> int:
        return sum(entry * shape[0] * shape[1] + square * c * c for entry, square in (way, *more))

    return count * max(total(_SWEEP_BYTES, columns), total(_DECOMPOSITION_BYTES, r))
