"""Measure checkpoints against a fixed reference: every tracked matrix, batched by shape."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlspec.errors import OptionError, TensorError
from rlspec.io.projections import Projection
from rlspec.linalg.autocast import without_autocast
from rlspec.linalg.precision import fast_matmul
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.delta import measure_delta
from rlspec.spectra.exact import measure_exact
from rlspec.spectra.matrix import MatrixBasis
from rlspec.spectra.measurement import Measurement, ReferenceStack
from rlspec.spectra.nulls import null_rotations
from rlspec.spectra.sources import Weights, WeightSource, open_weights, read_matrix, stack
from rlspec.spectra.table import Row, empty_row, measured_rows, put_nulls

Engine = Literal["delta", "exact"]
_ENGINES = {"delta": measure_delta, "exact": measure_exact}

# Matrices of one shape are stacked up to this many entries; a larger matrix goes alone. It bounds working
# memory (a few dozen bytes per entry) and keeps a stack of small matrices inside the last-level cache.
_STACK_ENTRIES = 4_000_000


@dataclass
class SpectralRecord:
    """The spectra of one checkpoint: one row per matrix (see ``table.COLUMNS``) and the arrays behind them.

    ``arrays`` maps ``"<name>/sigma"``, ``"<name>/sigma_ref"``, ``"<name>/block"``, ``"<name>/sines_left"``
    and ``"<name>/sines_right"`` to (k,) float64 tensors; blocks are labels of near-degenerate reference vectors; sines
    are descending, and missing for a side that is skipped.
    """

    stage: str
    step: int
    rows: list[Row]
    arrays: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Group:
    """Matrices measured together."""

    projections: tuple[Projection, ...]
    matrices: tuple[MatrixBasis, ...]
    reference: ReferenceStack | None  # None: rank 0, nothing to measure


class SpectralTracker:
    """Measures weights against a :class:`SpectralBasis`.

    Args:
        basis: the fixed reference.
        engine: ``"delta"``, products with the update alone, with error bounds; or ``"exact"``, a full float64
            SVD of every matrix: slower, and the oracle the other is tested against.
        arrays: keep singular values and sines in the record beside the scalar rows.
    """

    def __init__(self, basis: SpectralBasis, *, engine: Engine = "delta", arrays: bool = True) -> None:
        if engine not in _ENGINES:
            raise OptionError(f"unknown engine {engine!r}; valid: {', '.join(_ENGINES)}")
        self.basis = basis
        self.engine = engine
        self.arrays = arrays
        self._groups = tuple(_groups(basis, engine))

    def measure(
        self, source: WeightSource, *, step: int, stage: str = "", null_draws: int = 0
    ) -> SpectralRecord:
        """Measure one set of weights.

        Args:
            source: the module being trained, a mapping of named tensors, or a checkpoint folder. A module may be
                wrapped as trainers do, and weights may be scaled fp8; LoRA adapters of PEFT count with their weight.
            step: optimizer step, recorded in every row.
            stage: name of the training stage, likewise.
            null_draws: where positive, the ``null_*`` columns say how far rounding to bfloat16 and this many
                random updates of the same norm turn the subspaces; costs that many measurements more, plus one.

        Raises:
            TensorError: a weight is missing or there are two of its name, it has another shape than its reference or
                no values, is stored in a quantised form that is not known, or holds NaN or infinity.
        """
        with torch.no_grad(), without_autocast(), fast_matmul():
            return self._measure(source, step, stage, null_draws)

    def _measure(self, source: WeightSource, step: int, stage: str, null_draws: int) -> SpectralRecord:
        started = time.perf_counter()
        weights = open_weights(source)
        record = SpectralRecord(stage=stage, step=step, rows=[])
        rows: dict[str, Row] = {}
        for group in self._groups:
            stacked = stack(
                [_read(weights, p, m) for p, m in zip(group.projections, group.matrices, strict=True)]
            )
            if group.reference is None:
                pairs = zip(group.projections, group.matrices, strict=True)
                rows.update({p.name: empty_row(m, p, stage=stage, step=step) for p, m in pairs})
                continue
            engine = _ENGINES[self.engine]
            measurement = engine(group.reference, stacked)
            nulls = None
            if null_draws > 0:
                nulls = null_rotations(engine, group.reference, stacked, measurement, draws=null_draws)
            measured = measured_rows(measurement, group.matrices, group.projections, stage=stage, step=step)
            for i, (projection, matrix) in enumerate(zip(group.projections, group.matrices, strict=True)):
                rows[projection.name] = measured[i]
                if nulls is not None:
                    put_nulls(measured[i], nulls, i)
                if self.arrays:
                    record.arrays.update(_arrays(measurement, i, matrix))
        record.rows = [rows[projection.name] for projection in self.basis.projections]
        record.seconds = time.perf_counter() - started
        return record


def _groups(basis: SpectralBasis, engine: Engine) -> Iterator[_Group]:
    """Stacks of one shape, dtype and rank, each bounded in size.

    The delta engine's errors are relative to the update, so float32 factors do for weights that hold no more, and
    their products take half the time.
    """
    by_kind: dict[tuple[object, ...], list[Projection]] = {}
    for projection in basis.projections:
        matrix = basis.matrix(projection.name)
        by_kind.setdefault((matrix.shape, matrix.W.dtype, matrix.U.dtype, matrix.k), []).append(projection)
    for members in by_kind.values():
        first = basis.matrix(members[0].name)
        size = max(1, _STACK_ENTRIES // first.W.numel())
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            matrices = tuple(basis.matrix(p.name) for p in part)
            reference = ReferenceStack.of(list(matrices)) if first.k > 0 else None
            if reference is not None and engine == "delta" and first.W.dtype != torch.float64:
                reference = reference.in_float32()
            yield _Group(part, matrices, reference)


def _read(weights: Weights, projection: Projection, matrix: MatrixBasis) -> Tensor:
    weight = read_matrix(weights, projection).to(matrix.W.device)
    if tuple(weight.shape) != matrix.shape:
        raise TensorError(
            f"{projection.name}: the reference is {matrix.shape[0]}x{matrix.shape[1]}, this weight is "
            f"{'x'.join(str(d) for d in weight.shape)}"
        )
    return weight


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
