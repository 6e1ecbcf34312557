"""Whether parts of a tensor, each a box of it, make the whole: every element once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

#: A box: the first index along each axis, and the lengths.
Box = tuple[tuple[int, ...], tuple[int, ...]]
# Comparisons of two boxes for one tensor: 65536 boxes on a square grid take half of them, in some seconds.
_MOST_COMPARISONS = 1 << 24


def fault_of(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that should fill a shape without overlap; None where nothing is.

    Boxes without elements are passed over.
    """
    present = [(offsets, sizes) for offsets, sizes in boxes if prod(sizes)]
    for offsets, sizes in present:
        if not len(offsets) == len(sizes) == len(shape):
            return f"its part at {list(offsets)} of shape {list(sizes)} has other axes"
        if any(start + size > whole for start, size, whole in zip(offsets, sizes, shape, strict=True)):
            return f"its part at {list(offsets)} of shape {list(sizes)} lies outside"
    try:
        overlap = _overlap(present, len(shape))
    except _TanglingError:
        return f"its {len(present)} parts lie across one another, as no grid of processes divides a tensor"
    if overlap is not None:
        return f"its parts at {list(overlap[0][0])} and {list(overlap[1][0])} overlap"
    filled = sum(prod(sizes) for _, sizes in present)
    if filled != prod(shape):  # in bounds and apart: then it is a hole
        return f"its parts hold {filled} of {prod(shape)} elements"
    return None


class _TanglingError(Exception):
    """Each box would have to be compared with very many others."""


def _overlap(boxes: Sequence[Box], axes: int) -> tuple[Box, Box] | None:
    """Two boxes with an element in common.

    Swept along the axis on which most of them start apart: n parts side by side, or on a grid, take far fewer than n * n
    comparisons.

    Raises:
        _TanglingError: these take more than any that processes hold.
    """
    axis = max(range(axes), key=lambda a: len({offsets[a] for offsets, _ in boxes}), default=None)
    open_still: list[Box] = []
    left = _MOST_COMPARISONS
    for box in sorted(boxes, key=lambda b: 0 if axis is None else b[0][axis]):
        if axis is not None:
            open_still = [other for other in open_still if other[0][axis] + other[1][axis] > box[0][axis]]
        left -= len(open_still)
        if left < 0:
            raise _TanglingError
        for other in open_still:
            if _meet(box, other):
                return other, box
        open_still.append(box)
    return None


def _meet(one: Box, other: Box) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other, strict=True))
