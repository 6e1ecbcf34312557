"""Track a model that several processes train together: each measures its share of the matrices.

The weights may be copies (DistributedDataParallel) or spread over the processes as DTensors (FSDP2, tensor parallelism).
Then all join the gather of each matrix, one after the other, and its owner alone keeps it; once each process has a stack
of small matrices, or one large matrix, all work on theirs at once. No process ever holds more than that, the matrix that
is gathered, and its share of the reference. Copies are nobody's to hold: on a device they make larger stacks, as one
process has them, but for a share for every process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlspec.errors import RlspecError
from rlspec.io.counterparts import Names
from rlspec.io.heads import split_heads
from rlspec.io.module import module_device
from rlspec.io.projections import Projection, find_projections, parse_modules
from rlspec.io.updates import Update
from rlspec.io.weights import Weights, WeightSource, find_tensor, open_weights
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.rank import Rank, RankLike
from rlspec.spectra.basis import SpectralBasis, reference_matrices
from rlspec.spectra.processes import GatherError, Processes, dealt, raise_failures, told
from rlspec.spectra.room import stack_entries
from rlspec.spectra.spread import in_pieces, is_spread
from rlspec.spectra.table import Row
from rlspec.spectra.tracker import SpectralRecord, SpectralTracker

if TYPE_CHECKING:
    from rlspec.spectra.saved_basis import SavedBasis

#: by the name of the projection: the matrix, and what adapters add to it, see ``Weights.stream_apart``
_Matrices = dict[str, tuple[Tensor, Update | None]]


@dataclass
class _Stack:
    """Matrices of one shape that one process measures together."""

    owner: int
    projections: tuple[Projection, ...]
    cost: int
    tracker: SpectralTracker | None = field(default=None, repr=False)  # of the owner, once decomposed

    def follow(self, basis: SpectralBasis) -> None:
        # On a device every byte is the training's.
        self.tracker = SpectralTracker(basis, arrays=False, factors="host")


class DealtTracker:
    """A :class:`SpectralTracker` for a model that all processes of a training hold together.

    Every process makes one and calls its methods at the same points. On CPUs the rows are those that one process would
    measure, bit for bit, where ``rank`` is a share or a count.

    Args:
        model: what this process trains: whole, or with DTensors of FSDP2 or tensor parallelism. It may be wrapped.
        base: the reference: the folder of a safetensors checkpoint or of a saved basis, which every process can read; or
            a basis that all of them have; None for the model as it is now.
        modules, rank, per_head, cache_dir: see ``SpectralBasis.from_model``; a basis has its own matrices and rank.
        device: where to measure; None: where the model's weights are.

    Raises:
        ProcessError: it failed in one process, in all of them: for causes see ``SpectralBasis.from_model``; or they hold
            different matrices, as pipeline parallelism has it.
        GatherError: a process is gone.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        base: str | Path | SpectralBasis | None = None,
        modules: str | Sequence[str] = ("q", "k", "v"),
        rank: RankLike = 0.2,
        per_head: bool = False,
        cache_dir: str | Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.processes = Processes.of_training()
        self._rank = Rank.parse(rank)
        self._device = device
        self._cache_dir = cache_dir
        self._stacks: list[_Stack] = []
        basis: SpectralBasis | SavedBasis | None = None
        reference: WeightSource = model
        failure, shapes = None, {}
        try:
            if base is not None:
                # Imported here: measuring tensors in memory needs no compiled extension.
                from rlspec.spectra.saved_basis import SavedBasis, opened_base

                opened = opened_base(base)
                if isinstance(opened, SpectralBasis | SavedBasis):
                    basis = opened
                else:
                    reference = opened
            if basis is not None:
                self.projections, shapes = basis.projections, basis.shapes()
            else:
                shapes = self._find(open_weights(reference), modules, per_head)
            self._largest = self._largest_of(model)
        except Exception as error:
            failure = told(error)
        found = self.processes.gathered((failure, shapes))
        raise_failures([one for one, _ in found])
        first = found[0][1]
        raise_failures(
            [None if other == first else "holds other matrices than process 0" for _, other in found]
        )
        self._deal(shapes, _stacked_on(model, device))
        # Uneven where some find more of it in their caches than others.
        with self.processes.patient() as waiting, pinned_arithmetic():
            waiting.agree(self._decompose(reference) if basis is None else self._take(basis))

    def _find(
        self, source: Weights, modules: str | Sequence[str], per_head: bool
    ) -> dict[str, tuple[int, int]]:
        """Keep the projections; their shapes by name."""
        shapes = source.shapes()
        found = find_projections(shapes, parse_modules(modules), source.config())
        self.projections = tuple(split_heads(found, shapes, source.config()) if per_head else found)
        return {p.name: p.shape(shapes[p.tensor]) for p in self.projections}

    def _largest_of(self, model: nn.Module) -> int:
        """Entries of the largest tensor of the model that holds one of the projections."""
        held = open_weights(model)
        shapes = held.shapes()
        names = Names(shapes)
        found = [find_tensor(p.tensor, names, held.where) for p in self.projections]
        return max((math.prod(shapes[name]) for name in found), default=0)

    def _deal(self, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        """Stacks, the costliest first to whoever has the least to do; on CPUs those that one process would measure.

        Args:
            device: for which they are sized; of one kind in all processes.
        """
        by_shape: dict[tuple[int, int], list[Projection]] = {}
        for projection in self.projections:
            by_shape.setdefault(shapes[projection.name], []).append(projection)
        costs: list[tuple[int, list[Projection]]] = []
        for (m, n), members in by_shape.items():
            size = max(1, stack_entries(device) // max(1, m * n))
            if device.type != "cpu":
                size = min(size, math.ceil(len(members) / self.processes.count))
            parts = [members[start : start + size] for start in range(0, len(members), size)]
            costs += [(m * n * min(m, n) * len(part), part) for part in parts]
        owners = dealt([cost for cost, _ in costs], self.processes.count)
        self._stacks += [_Stack(owner, tuple(part), cost) for owner, (cost, part) in zip(owners, costs)]
        # By layer: what a fused tensor holds for other stacks does not wait for long.
        place = {projection.name: at for at, projection in enumerate(self.projections)}
        self._stacks.sort(key=lambda stack: place[stack.projections[0].name])

    def _decompose(self, source: WeightSource) -> str | None:
        """Make the trackers of this process's stacks; what went wrong, None where nothing did."""

        def work(stack: _Stack, matrices: _Matrices) -> None:
            devices = {p.name: self._device or matrices[p.name][0].device for p in stack.projections}
            weights = ((p, matrices.pop(p.name)[0]) for p in stack.projections)
            count = len(stack.projections)
            basis = reference_matrices(weights, self._rank, self._cache_dir, count=count)
            stack.follow(SpectralBasis(stack.projections, basis, self._rank, devices=devices))

        return self._walk(source, work)

    def _take(self, basis: SpectralBasis | SavedBasis) -> str | None:
        """The same from factors that are there already."""
        device = self._device or torch.device("cpu")
        try:
            for stack in self._stacks:
                if stack.owner == self.processes.number:
                    stack.follow(basis.part(stack.projections, device=device))
        except Exception as error:
            return told(error)
        return None

    def measure(self, model: nn.Module, *, step: int, stage: str = "") -> SpectralRecord:
        """Measure the model as it is now.

        Returns:
            The same record in all processes, without arrays.

        Raises:
            ProcessError: it failed in one process, in all of them; for causes see ``SpectralTracker.measure``.
            GatherError: a process is gone.
        """
        rows: dict[str, Row] = {}
        seconds = [0.0]

        def work(stack: _Stack, matrices: _Matrices) -> None:
            assert stack.tracker is not None
            record = stack.tracker.measure(_Handed(matrices), step=step, stage=stage)
            rows.update(zip((p.name for p in stack.projections), record.rows, strict=True))
            seconds[0] += record.seconds

        with pinned_arithmetic():
            failure = self._walk(model, work, apart=True)
        found = self.processes.gathered((failure, rows, seconds[0]))
        raise_failures([one for one, _, _ in found])
        by_name = {name: row for _, part, _ in found for name, row in part.items()}
        ordered = [by_name[projection.name] for projection in self.projections]
        return SpectralRecord(stage, step, ordered, seconds=max(spent for _, _, spent in found))

    def _walk(
        self, source: WeightSource, work: Callable[[_Stack, _Matrices], None], *, apart: bool = False
    ) -> str | None:
        """Call ``work`` with the matrices of each stack of this process; join the gathers of the others' stacks.

        Args:
            apart: what adapters add is given beside the matrices, not in them.

        Returns:
            What went wrong in this process, whose later stacks are then gathered and dropped.

        Raises:
            ProcessError, GatherError: see :func:`make_room`.
        """
        failure: str | None = None
        spread = isinstance(source, nn.Module) and is_spread(source)
        if isinstance(source, nn.Module) and spread:
            make_room(in_pieces(source), self._largest, self.processes)
        try:
            for stack, matrices in self._own(source, apart=apart, spread=spread):
                if failure is None:
                    try:
                        work(stack, matrices)
                    except Exception as error:
                        failure = told(error)
                matrices.clear()  # before the next ones are gathered
        except GatherError:
            raise
        except (
            Exception
        ) as error:  # of the weights: where they are spread, all processes meet it at the same one
            failure = failure or told(error)
        return failure

    def _own(self, source: WeightSource, *, apart: bool, spread: bool) -> Iterator[tuple[_Stack, _Matrices]]:
        """The stacks of this process with their matrices, each once the gathers of its round are done."""
        mine = self.processes.number
        weights = open_weights(source)
        if not spread:
            stacks = [stack for stack in self._stacks if stack.owner == mine]
            stream = gathered(weights, [p for stack in stacks for p in stack.projections], apart=apart)
            for stack in stacks:
                taken = (next(stream) for _ in stack.projections)
                yield stack, {projection.name: (matrix, update) for projection, matrix, update in taken}
            return
        # Each round is read by itself: what a fused tensor holds for a later one would wait for long.
        for stacks in self._rounds():
            own = next((stack for stack in stacks if stack.owner == mine), None)
            names = {p.name for p in own.projections} if own else set()
            matrices: _Matrices = {}
            passing = [p for stack in stacks for p in stack.projections]
            for projection, matrix, update in gathered(weights, passing, apart=apart, spread=True):
                if projection.name in names:
                    matrices[projection.name] = matrix, update
                del matrix, update  # before the next one is asked for
            if own is not None:
                yield own, matrices

    def _rounds(self) -> Iterator[list[_Stack]]:
        """The stacks in groups with at most one of each process: all have as much to do in each as can be."""
        by_owner: list[list[_Stack]] = [[] for _ in range(self.processes.count)]
        for stack in sorted(self._stacks, key=lambda stack: -stack.cost):
            by_owner[stack.owner].append(stack)
        for group in itertools.zip_longest(*by_owner):
            yield [stack for stack in group if stack is not None]


def gathered(
    weights: Weights, projections: Sequence[Projection], *, apart: bool = False, spread: bool = False
) -> Iterator[tuple[Projection, Tensor, Update | None]]:
    """``Weights.stream_apart``, or ``Weights.stream`` with no update beside the matrices; where it gathers, an error that
    leaves the processes in different places is told as such.

    Args:
        spread: they are those of a model that is, see :func:`is_spread`.

    Raises:
        GatherError: the weights are spread and could not be gathered; other errors are those of ``Weights.stream``.
    """
    try:
        if apart:
            yield from weights.stream_apart(projections)
        else:
            for projection, matrix in weights.stream(projections):
                yield projection, matrix, None
                del matrix
    except RlspecError:
        raise
    except Exception as error:
        if spread:
            raise GatherError(f"gathering the weights failed: {error}") from error
        raise


def make_room(model: nn.Module, entries: int, processes: Processes) -> None:
    """Take the memory that gathering a tensor of so many entries takes, and give it back; called in all processes.

    One that has not got it must say so before it joins a gather: the others would wait for it there. What a device's
    allocator is given back it keeps for the gathers; a host only promises memory, so that little is found out there.

    Raises:
        ProcessError: one process has not the memory, in all of them.
        GatherError: a process is gone.
    """

    def take() -> None:
        spread: list[Any] = [tensor for tensor in model.parameters() if hasattr(tensor, "full_tensor")]
        widest = max(spread, key=lambda tensor: tensor.element_size())
        kind = widest.device_mesh.device_type
        # What comes from the others, the whole that it is put together to, and one that waits for the end of its round.
        held = [torch.empty(entries, dtype=widest.dtype, device=kind) for _ in range(3)]
        del held

    processes.together(take)


def _stacked_on(model: nn.Module, device: torch.device | None) -> torch.device:
    """The device that stacks are sized for. What is gathered is held until its stack is whole: there a device, too, takes
    the small ones of a CPU."""
    if is_spread(model):
        return torch.device("cpu")
    return device or module_device(model)


class _Handed(Weights):
    """Matrices by the name of their projection, each handed on once."""

    def __init__(self, matrices: _Matrices) -> None:
        self._given = matrices

    def stream_apart(
        self, projections: Sequence[Projection]
    ) -> Iterator[tuple[Projection, Tensor, Update | None]]:
        return ((projection, *self._given.pop(projection.name)) for projection in projections)
