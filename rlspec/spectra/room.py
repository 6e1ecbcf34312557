"""How many matrices are measured together, and how many of those at once where a device's memory is short.

Two decisions. A stack is made once, by the sizes of its matrices alone: its guard band has one width, and rows should not
depend on what else was in a device's memory. At each event a device takes as much of a stack at a time as it then has
room for: what a training holds grows after its first steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

# Matrices of one shape are stacked up to this many entries; a larger matrix goes alone. On a CPU that keeps the stacks of
# small matrices, one a thread, inside the caches; on a device it bounds the kernels' work to what keeps it busy.
STACK_ENTRIES, DEVICE_STACK_ENTRIES = 1 << 20, 1 << 28

# Bytes that an event takes on a device for each of the m n entries of a matrix, and for each of w² more, w its guard
# band: stacked weights, float32 factors, what is computed of them. Above the peaks counted with PyTorch's own operations,
# whatever the update and the rank; kernels take less.
_ENTRY_BYTES, _CORE_BYTES = 48, 150
# A random update in float64, the weights that it is rounded from, and the copy that the engine works on.
_NULL_BYTES = 16


def stack_entries(device: torch.device) -> int:
    """The most entries of a stack of several matrices."""
    return STACK_ENTRIES if device.type == "cpu" else DEVICE_STACK_ENTRIES


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated on a device: free memory, and what torch's allocator keeps of freed tensors.

    None of the CPU, which only promises memory.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def event_bytes(shape: tuple[int, int], width: int, *, wide: bool, nulls: bool) -> int:
    """A bound on what measuring one matrix (m, n) takes on a device at once, in bytes.

    Args:
        width: columns of its cores.
        wide: its factors are float64.
        nulls: random updates are drawn.
    """
    entry = _ENTRY_BYTES * (2 if wide else 1) + (_NULL_BYTES if nulls else 0)
    return entry * shape[0] * shape[1] + _CORE_BYTES * width * width


def spans(count: int, each: int, free: int | None) -> Iterator[tuple[int, int]]:
    """The [start, stop) of parts of a stack of ``count`` that fit ``free`` bytes at ``each`` a matrix, in equal shares.

    A matrix that does not fit alone is tried alone; all are one part where ``free`` is None.
    """
    most = count if free is None else max(1, min(count, free // each))
    parts = -(-count // most)
    bounds = [count * part // parts for part in range(parts + 1)]
    return pairwise(bounds)
