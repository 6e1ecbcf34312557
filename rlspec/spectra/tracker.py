"""Measure checkpoints against a fixed reference: every tracked matrix, batched by shape."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from rlspec.errors import OptionError, check_type
from rlspec.io.tabular import Tabular
from rlspec.io.weights import READ_AHEAD_BYTES, WeightSource, open_weights
from rlspec.linalg.dense import lapack_values
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.workers import in_order, is_small
from rlspec.perturb.matrix import MatrixBasis
from rlspec.perturb.reference import Reference
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.current import Current
from rlspec.spectra.delta import measure_delta
from rlspec.spectra.exact import measure_exact
from rlspec.spectra.groups import Group, apart, groups_of, placed
from rlspec.spectra.measurement import Measurement
from rlspec.spectra.nulls import null_rotations
from rlspec.spectra.room import free_bytes
from rlspec.spectra.subspaces import Subspaces, locking
from rlspec.spectra.table import COLUMNS, Row, empty_row, measured_rows, put_locking, put_nulls, put_spectrum

Engine = Literal["delta", "exact"]
Factors = Literal["auto", "device", "host"]
T = TypeVar("T")
#: What :meth:`SpectralTracker.subspaces` found of each of its stacks; None of one without a direction to follow.
Ends = tuple[Subspaces | None, ...]
_Measured = tuple[dict[str, Row], dict[str, Tensor]]  # rows and arrays, by name
_ENGINES = {"delta": measure_delta, "exact": measure_exact}


@dataclass
class SpectralRecord(Tabular):
    """The spectra of one checkpoint: one row per matrix (see ``table.COLUMNS``) and the arrays behind them.

    ``arrays`` maps ``"<name>/sigma"``, ``"<name>/sigma_ref"``, ``"<name>/block"``, ``"<name>/sines_left"``
    and ``"<name>/sines_right"`` to (k,) float64 tensors; blocks are labels of near-degenerate reference vectors; sines
    are descending, and missing for a side that is skipped. ``scores`` are those of the model at that step, where
    somebody took them.
    """

    stage: str
    step: int
    rows: list[Row]
    arrays: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)

    def _table(self) -> tuple[Sequence[str], Sequence[Row]]:
        return list(COLUMNS), self.rows


class SpectralRecords(Tabular, list[SpectralRecord]):
    """A list of records, whose rows make one table."""

    def _table(self) -> tuple[Sequence[str], Sequence[Row]]:
        return list(COLUMNS), [row for record in self for row in record.rows]


class SpectralTracker:
    """Measures weights against a :class:`SpectralBasis`.

    Args:
        basis: the fixed reference.
        engine: ``"delta"``, products with the update alone, with error bounds; or ``"exact"``, a full float64
            SVD of every matrix: slower, and the oracle the other is tested against.
        arrays: keep singular values and sines in the record beside the scalar rows.
        factors: where the reference's factors stay between measurements: ``"device"``, where they are used; ``"host"``,
            from where they stream in each time; ``"auto"``, see :func:`factor_place`.
    """

    def __init__(
        self,
        basis: SpectralBasis,
        *,
        engine: Engine = "delta",
        arrays: bool = True,
        factors: Factors = "auto",
    ) -> None:
        if engine not in _ENGINES:
            raise OptionError(f"unknown engine {engine!r}; valid: {', '.join(_ENGINES)}")
        wanted = "a SpectralBasis, as SpectralBasis.from_checkpoint(path) builds it"
        check_type("basis", basis, SpectralBasis, wanted)
        self.basis = basis
        self.engine = engine
        self.arrays = arrays
        if factors not in get_args(Factors):
            raise OptionError(f"unknown factors {factors!r}; valid: {', '.join(get_args(Factors))}")
        self.factors = factor_place(basis) if factors == "auto" else factors
        # By layer: what a fused tensor holds for other groups does not wait for long.
        place = {projection.name: at for at, projection in enumerate(basis.projections)}
        # The delta engine's errors are relative to the update, so float32 factors do for weights that hold no more, and
        # their products take half the time.
        groups = groups_of(basis, narrow=engine == "delta", on_host=self.factors == "host")
        self._groups = sorted(groups, key=lambda group: place[group.projections[0].name])

    def measure(
        self,
        source: WeightSource,
        *,
        step: int,
        stage: str = "",
        null_draws: int = 0,
        full_spectrum: bool = False,
        end: Ends | None = None,
    ) -> SpectralRecord:
        """Measure one set of weights.

        Args:
            source: the module being trained, a mapping of named tensors, or a checkpoint folder. A module may be
                wrapped as trainers do, and weights may be scaled fp8; LoRA adapters of PEFT count with their weight.
            step: optimizer step, recorded in every row.
            stage: name of the training stage, likewise.
            null_draws: where positive, the ``null_*`` columns say how far rounding to bfloat16 and this many
                random updates of the same norm turn the subspaces; costs that many measurements more, plus one.
            full_spectrum: fill ``nss`` and the ``alpha`` columns, which need every singular value: each weight is
                decomposed in float64, on the host.
            end: what :meth:`subspaces` found of other weights, those at the end of the training: fill the ``locking_*``
                columns, but for ``locking_end``.

        Raises:
            TensorError: a weight is missing or there are two of its name, it has another shape than its reference or
                no values, is stored in a quantised form that is not known, or holds NaN or infinity.
        """
        with pinned_arithmetic():
            return self._measure(source, step, stage, null_draws, full_spectrum, end)

    def subspaces(self, source: WeightSource) -> Ends:
        """The leading subspaces of one set of weights, for :meth:`measure` to compare others with; of this tracker alone.

        Costs what a measurement does. Arguments and errors are those of :meth:`measure`.
        """
        with pinned_arithmetic():
            parts: dict[str, list[Subspaces]] = {group.stack: [] for group in self._groups}
            for found in in_order(self._jobs(source, self._found), self._most_at_once()):
                for name, one in found:
                    parts[name] += [] if one is None else [one]
            return tuple(_joined(of_stack) for of_stack in parts.values())

    def _measure(
        self,
        source: WeightSource,
        step: int,
        stage: str,
        null_draws: int,
        full_spectrum: bool,
        end: Ends | None,
    ) -> SpectralRecord:
        started = time.perf_counter()
        record = SpectralRecord(stage=stage, step=step, rows=[])
        rows: dict[str, Row] = {}
        stacks = (group.stack for group in self._groups)
        ends = {} if end is None else dict(zip(stacks, end, strict=True))

        def work(group: Group, reference: Reference | None, current: Current) -> _Measured:
            last = ends.get(group.stack)
            if last is not None:
                last = last.part(group.start, group.start + len(group.matrices))
            return self._measured(group, reference, current, step, stage, null_draws, full_spectrum, last)

        jobs = self._jobs(source, work, nulls=null_draws > 0)
        for found in in_order(jobs, self._most_at_once()):
            for measured, arrays in found:
                rows.update(measured)
                record.arrays.update(arrays)
        record.rows = [rows[projection.name] for projection in self.basis.projections]
        record.seconds = time.perf_counter() - started
        return record

    def _most_at_once(self) -> int:
        """How many stacks of small matrices a reader of checkpoints may hold for us: with one that waits, one that is
        being read, or else the largest matrix."""
        sizes = [sum(matrix.W.nbytes for matrix in group.matrices) for group in self._groups]
        single = [group.matrices[0].W.numel() for group in self._groups]
        small = max((size for size, entries in zip(sizes, single) if is_small(entries)), default=0)
        largest = max(sizes, default=0)
        room = max(READ_AHEAD_BYTES, 2 * largest) - largest
        # One alone stays with this thread, in whose heap there is room that was freed.
        return max(1, min(len(sizes), room // small - 2)) if small else 1

    def _jobs(
        self,
        source: WeightSource,
        work: Callable[[Group, Reference | None, Current], T],
        *,
        nulls: bool = False,
    ) -> Iterator[tuple[int, Callable[[], list[T]]]]:
        """What is to be done of each stack with its current weights: ``work``, of the whole of it or by parts."""
        stream = open_weights(source).stream_apart([p for group in self._groups for p in group.projections])
        for whole in self._groups:
            waiting = deque(whole.parts(nulls=nulls))
            while waiting:
                group, reference = placed(waiting)
                current = Current.of(stream, group.matrices, group.device, reference)
                on_host = group.device.type == "cpu"
                yield (
                    group.matrices[0].W.numel() if on_host else sys.maxsize,
                    partial(apart, work, group, reference, current),
                )
                del reference, current  # before the next ones take their room

    @pinned_arithmetic()
    def _found(
        self, group: Group, reference: Reference | None, current: Current
    ) -> tuple[str, Subspaces | None]:
        """With the name of the stack."""
        if reference is None:
            return group.stack, None
        engine = partial(_ENGINES[self.engine], subspaces=True)
        return group.stack, current.measured(engine, reference).subspaces

    @pinned_arithmetic()
    def _measured(
        self,
        group: Group,
        reference: Reference | None,
        current: Current,
        step: int,
        stage: str,
        null_draws: int,
        full_spectrum: bool,
        end: Subspaces | None,
    ) -> _Measured:
        pairs = list(zip(group.projections, group.matrices, strict=True))
        if reference is None:
            return {p.name: empty_row(m, p, stage=stage, step=step) for p, m in pairs}, {}
        engine, shared = _ENGINES[self.engine], None
        measurement = current.measured(partial(engine, subspaces=end is not None), reference)
        if end is not None and measurement.subspaces is not None:
            shared = locking(measurement.subspaces, end)
            measurement = replace(measurement, subspaces=None)  # the room may be wanted for what follows
        nulls = None
        if null_draws > 0:
            weights = current.weights(reference)
            nulls = null_rotations(engine, reference, weights, measurement, draws=null_draws)
        rows = measured_rows(measurement, group.matrices, group.projections, stage=stage, step=step)
        sigma = lapack_values(current.weights(reference).cpu().double()) if full_spectrum else None
        arrays: dict[str, Tensor] = {}
        for i, (row, matrix) in enumerate(zip(rows, group.matrices, strict=True)):
            if sigma is not None:
                same = bool(measurement.update.delta_frobenius[i] == 0)
                put_spectrum(row, matrix.S if same else sigma[i], matrix.S)
            if shared is not None:
                put_locking(row, shared, i)
            if nulls is not None:
                put_nulls(row, nulls, i)
            if self.arrays:
                arrays.update(_arrays(measurement, i, matrix))
        return {p.name: row for p, row in zip(group.projections, rows, strict=True)}, arrays


def factor_place(basis: SpectralBasis) -> Literal["device", "host"]:
    """Where a tracker keeps the factors by default: on the device where they fill at most half of its free memory."""
    needed: dict[torch.device, int] = {}
    for projection in basis.projections:
        matrix, device = basis.matrix(projection.name), basis.device(projection.name)
        values = matrix.U.numel() + matrix.Vh.numel()
        needed[device] = needed.get(device, 0) + 4 * values + matrix.W.numel() * matrix.W.element_size()
    for device, total in needed.items():
        free = free_bytes(device)
        if free is not None and total > free // 2:
            return "host"
    return "device"


def _arrays(measurement: Measurement, index: int, matrix: MatrixBasis) -> dict[str, Tensor]:
    arrays = {
        "sigma": measurement.sigma[index],
        "sigma_ref": matrix.S[: matrix.k],
        "block": measurement.blocks[index],
    }
    if measurement.sines_left is not None:
        arrays["sines_left"] = measurement.sines_left[index]
    if measurement.sines_right is not None:
        arrays["sines_right"] = measurement.sines_right[index]
    # Copies: a view would keep, and a file would store, the whole stack.
    return {
        f"{matrix.name}/{name}": values.detach().double().cpu().clone() for name, values in arrays.items()
    }


def _joined(parts: list[Subspaces]) -> Subspaces | None:
    """Of a stack from those of its parts."""
    if len(parts) > 1:
        return Subspaces.joined(parts)
    return parts[0] if parts else None
