"""Stacks of matrices that are measured together, and the parts they are measured in where a device is short of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from rlspec.io.projections import Projection
from rlspec.perturb.matrix import MatrixBasis
from rlspec.perturb.reference import Reference, guard_width, stack
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.current import Current
from rlspec.spectra.room import event_bytes, free_bytes, spans, stack_entries

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Matrices measured together; or a part of such a stack, from ``start`` on, where a device has no room for all."""

    projections: tuple[Projection, ...]
    matrices: tuple[MatrixBasis, ...]
    device: torch.device
    dtype: torch.dtype | None  # of the factors; None: as they are
    width: int  # of the whole stack's guard band, so that parts are measured as the whole is
    stack: str  # the name of the whole stack's first matrix
    start: int = 0
    kept: Reference | None = None  # None: made anew for each measurement from what the host holds

    @property
    def rank(self) -> int:
        return self.matrices[0].k

    def reference(self) -> Reference | None:
        """The factors where they are used; None of matrices without a direction to follow."""
        if self.rank == 0:
            return None
        return self.kept if self.kept is not None else self.placed()

    def placed(self) -> Reference:
        return Reference.of(self.matrices, device=self.device, dtype=self.dtype, width=self.width)

    def part(self, start: int, stop: int) -> Group:
        if (start, stop) == (0, len(self.matrices)):
            return self
        return replace(
            self,
            projections=self.projections[start:stop],
            matrices=self.matrices[start:stop],
            start=self.start + start,
            kept=None if self.kept is None else self.kept.part(start, stop),
        )

    def parts(self, *, nulls: bool) -> list[Group]:
        """What the device has room for at a time, as it is now."""
        if self.rank == 0:
            return [self]
        wide = (self.dtype or self.matrices[0].U.dtype) == torch.float64
        each = event_bytes(self.matrices[0].shape, self.width, wide=wide, nulls=nulls)
        return [self.part(*span) for span in spans(len(self.matrices), each, free_bytes(self.device))]


def groups_of(basis: SpectralBasis, *, narrow: bool, on_host: bool) -> Iterator[Group]:
    """Stacks of one shape, dtype, rank and device, each bounded in size.

    Args:
        narrow: factors in float32 for weights that hold no more.
        on_host: the factors of a device wait on the host from one measurement to the next.
    """
    by_kind: dict[tuple[object, ...], list[Projection]] = {}
    for projection in basis.projections:
        matrix, device = basis.matrix(projection.name), basis.device(projection.name)
        kind = (matrix.shape, matrix.W.dtype, matrix.U.dtype, matrix.k, str(device))
        by_kind.setdefault(kind, []).append(projection)
    for members in by_kind.values():
        first, device = basis.matrix(members[0].name), basis.device(members[0].name)
        size = max(1, stack_entries(device) // first.W.numel())
        dtype = torch.float32 if narrow and first.W.dtype != torch.float64 else None
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            matrices = tuple(basis.matrix(p.name) for p in part)
            width = guard_width(stack([m.S for m in matrices]), first.k, max(first.shape)) if first.k else 0
            group = Group(part, matrices, device, dtype, width, part[0].name)
            if first.k == 0 or (on_host and device.type != "cpu"):
                yield group
            else:
                yield replace(group, kept=group.placed())


def placed(waiting: deque[Group]) -> tuple[Group, Reference | None]:
    """The next part with its factors on its device; its second half waits again where the device has no room for all.

    Raises:
        torch.OutOfMemoryError: there is none for one matrix.
    """
    while True:
        group = waiting.popleft()
        try:
            return group, group.reference()
        except torch.OutOfMemoryError:
            if len(group.matrices) == 1:
                raise
        # Out of the handler, whose traceback keeps what had been allocated.
        waiting.extendleft(group.part(*half) for half in reversed(_halves(group)))


def apart(
    work: Callable[[Group, Reference | None, Current], T],
    group: Group,
    reference: Reference | None,
    current: Current,
) -> list[T]:
    """What ``work`` makes of a part; of its halves, and theirs, in order, where there is no room for what it computes.

    Raises:
        torch.OutOfMemoryError: there is none for one matrix.
    """
    try:
        return [work(group, reference, current)]
    except torch.OutOfMemoryError:
        if len(group.matrices) == 1:
            raise
    found: list[T] = []  # as above
    for half in _halves(group):
        factors = None if reference is None else reference.part(*half)
        found += apart(work, group.part(*half), factors, current.part(*half))
    return found


def _halves(group: Group) -> list[tuple[int, int]]:
    count = len(group.matrices)
    return [(0, count // 2), (count // 2, count)]
