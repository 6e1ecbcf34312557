"""Which matrices are measured together, and the memory that this takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rlspec.errors import OptionError
from rlspec.io.projections import Projection
from rlspec.linalg.workers import is_small
from rlspec.spectra.tracker import stack_entries

# Bytes for each entry of a stack (weights, factors, the update, what an engine makes of them) and for each of one smaller
# Gram matrix. Above the peaks measured of either engine, with every direction followed and random updates drawn; what is
# usual, the delta engine and a fifth of the directions, takes half.
_STACK_BYTES, _GRAM_BYTES = 145, 75
# For each entry of a stack whose subspaces are compared with others', which are held meanwhile: with every direction
# followed 3 numbers of float64, and 2 for their Gram matrices. The comparison needs less than the measurement before it.
_SUBSPACE_BYTES = 40
# Of stacks that are measured side by side, each: a thread's heap keeps some of what is freed in it. Two matrices of
# 1024x1024 with every direction followed and random updates drawn took 2.1 times what the bytes above come to.
_HEAP_SHARE = 2.2


def stacks(
    projections: Sequence[Projection],
    shapes: Mapping[str, tuple[int, ...]],
    memory: int,
    memory_gib: float,
    *,
    device: torch.device,
    parts: int = 1,
    locking: bool = False,
) -> tuple[tuple[Projection, ...], ...]:
    """Matrices of one shape, in stacks that fit the memory, in the order of their first ones.

    Args:
        device: where they are measured.
        parts: how many of a tracker's stacks of small matrices may make one, to be measured side by side.
        locking: whether their subspaces are compared with others'.
        memory: bound in bytes; ``memory_gib`` is what messages call it.

    Raises:
        OptionError: one matrix alone does not fit.
    """
    by_shape: dict[tuple[int, int], list[Projection]] = {}
    for projection in projections:
        by_shape.setdefault(projection.shape(shapes[projection.tensor]), []).append(projection)
    found = []
    for shape, members in by_shape.items():
        alone = stack_bytes(shape, 1, locking=locking)
        if alone > memory:
            raise OptionError(
                f"memory_gib={memory_gib} is too little: {members[0].name} ({shape[0]}x{shape[1]}) takes up to "
                f"{alone / 2**30:.2g} GiB to decompose and measure"
            )
        # As a tracker stacks them: a row is then the same as that of a tracker of the whole model.
        entries = shape[0] * shape[1]
        size = max(1, stack_entries(device) // max(1, entries))
        most = parts if is_small(entries) else 1
        each = _HEAP_SHARE * stack_bytes(shape, size, locking=locking)
        together = next((n for n in range(most, 1, -1) if n * each <= memory), 1)
        while size > 1 and stack_bytes(shape, size, locking=locking) > memory:
            size -= 1
        size *= together
        found += [tuple(members[i : i + size]) for i in range(0, len(members), size)]
    return tuple(found)


def stack_bytes(shape: tuple[int, int], count: int, *, locking: bool = False) -> int:
    """A bound on the memory that decomposing and measuring ``count`` matrices (m, n) takes at once."""
    entry = _STACK_BYTES + (_SUBSPACE_BYTES if locking else 0)
    return entry * shape[0] * shape[1] * count + _GRAM_BYTES * min(shape) ** 2
