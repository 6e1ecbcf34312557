"""Measure checkpoints on disk against their base: matrix by matrix, whatever their size.

The outer loop goes over stacks of matrices, the inner one over checkpoints. So each matrix of the base is decomposed
once however many checkpoints there are, and no more is held than one stack needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from rlspec.backend import choose_device
from rlspec.errors import OptionError, RlspecError, TensorError
from rlspec.io.projections import Projection, find_projections, parse_modules
from rlspec.io.weights import CheckpointWeights, find_tensor
from rlspec.jobs.series.checkpoints import Checkpoint, Files, find_checkpoints
from rlspec.jobs.series.result import Series
from rlspec.jobs.series.stacks import stacks
from rlspec.jobs.series.table import SpectraTable
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.rank import Rank, RankLike
from rlspec.restore.estimate import memory_bytes
from rlspec.spectra.basis import SpectralBasis, reference_matrix
from rlspec.spectra.tracker import Engine, SpectralTracker

#: called with (matrices measured, matrices in all, checkpoint, matrix)
OnMatrix = Callable[[int, int, str, str], None]


def measure(
    base: str | Path,
    checkpoints: str | Path | Iterable[str | Path],
    *,
    out: str | Path | None = None,
    modules: str | Iterable[str] = ("q", "k", "v"),
    rank: RankLike = 0.2,
    engine: Engine = "delta",
    null_draws: int = 0,
    device: torch.device | str = "auto",
    memory_gib: float = 4.0,
    cache_dir: str | Path | None = None,
    on_matrix: OnMatrix | None = None,
) -> Series:
    """The spectra of checkpoints on disk against those of their base.

    Args:
        base: the reference, a safetensors checkpoint: a folder in the layout of Hugging Face (a snapshot in its cache is
            one), or a file.
        checkpoints: such folders or files, LoRA adapters of PEFT (measured as W + s B A), and folders of those.
        out: folder for ``spectra.jsonl``. What is in its table already is not measured again; an interrupted series goes
            on. None keeps the rows in memory alone.
        modules, rank, engine, null_draws, device: see ``SpectralBasis.from_checkpoint`` and ``SpectralTracker``.
        memory_gib: bound on tensors and decompositions that are held at once on the host, GiB.
        cache_dir: where the base's decompositions are kept; default ``$RLSPEC_CACHE`` or ``~/.cache/rlspec``.
        on_matrix: called after every matrix of every checkpoint.

    Returns:
        All checkpoints that are whole in the table, in the order of their steps: those of earlier calls with the same
        ``out``, too.

    Raises:
        CheckpointError: a checkpoint is not there, not whole, malformed, or in a format that is not read.
        ProjectionError, TensorError: a matrix is missing, of another shape than the base's, or holds NaN or infinity.
        OptionError: an argument out of range, or less memory than one matrix takes.
        RunFolderError: ``out`` holds rows measured otherwise, or is in use.
    """
    given = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    job = Job.open(
        base,
        out=out,
        modules=modules,
        rank=rank,
        engine=engine,
        null_draws=null_draws,
        device=device,
        memory_gib=memory_gib,
        cache_dir=cache_dir,
    )
    try:
        job.measure(find_checkpoints(given), on_matrix)
        return job.table.settle()
    finally:
        job.table.close()


@dataclass(frozen=True)
class Job:
    """The base, what is measured and how, and the table of what was; see :func:`measure`."""

    base: Path
    weights: CheckpointWeights
    stacks: tuple[tuple[Projection, ...], ...]
    shapes: dict[str, tuple[int, ...]]
    rank: Rank
    engine: Engine
    null_draws: int
    device: torch.device
    cache_dir: str | Path | None
    table: SpectraTable

    @classmethod
    def open(
        cls,
        base: str | Path,
        *,
        out: str | Path | None,
        modules: str | Iterable[str],
        rank: RankLike,
        engine: Engine,
        null_draws: int,
        device: torch.device | str,
        memory_gib: float,
        cache_dir: str | Path | None = None,
    ) -> Job:
        """Check the arguments, read the base's headers and open the table."""
        if engine not in get_args(Engine):
            raise OptionError(f"unknown engine {engine!r}; valid: {', '.join(get_args(Engine))}")
        if isinstance(null_draws, bool) or not isinstance(null_draws, int) or null_draws < 0:
            raise OptionError(f"null_draws={null_draws!r} must be a whole number, at least 0")
        memory = memory_bytes(memory_gib)
        rule, wanted, place = Rank.parse(rank), parse_modules(modules), Path(base)
        chosen = choose_device(device)
        if out is not None and Path(out).resolve() == place.resolve():
            raise OptionError(f"out={str(out)!r} is the base, which is never written to")
        weights = CheckpointWeights(place)
        shapes = weights.shapes()
        projections = find_projections(shapes, wanted, weights.config())
        parts = stacks(projections, shapes, memory, memory_gib)
        settings = {
            "base": str(place.resolve()),
            "base_files": Checkpoint.at(place).files(),
            "modules": list(wanted),
            "rank": str(rule),
            "engine": engine,
            "null_draws": null_draws,
        }
        names = [projection.name for projection in projections]
        table = SpectraTable(None if out is None else Path(out), settings, names)
        return cls(place, weights, parts, shapes, rule, engine, null_draws, chosen, cache_dir, table)

    @pinned_arithmetic()
    def measure(self, checkpoints: Sequence[Checkpoint], on_matrix: OnMatrix | None = None) -> list[str]:
        """Measure what the table lacks of these checkpoints; returns their labels."""
        opened = [(checkpoint, self._checked(checkpoint)) for checkpoint in checkpoints]
        if self.table.is_one_of(checkpoints):
            raise OptionError("out= is one of the checkpoints, which are never written to")
        entries: list[tuple[Checkpoint, Files]] = [
            (checkpoint, checkpoint.files()) for checkpoint in checkpoints
        ]
        labels = self.table.add(entries)
        total = sum(len(self.table.missing(label)) for label in labels)
        done = 0
        for stack, label, (checkpoint, weights), tracker in self._to_do(labels, opened):
            lacking = self.table.missing(label)
            self.table.put(label, self._rows(tracker, checkpoint, weights))
            for projection in stack:
                if projection.name in lacking:
                    done += 1
                    if on_matrix is not None:
                        on_matrix(done, total, label, projection.name)
        return labels

    def _to_do(
        self, labels: Sequence[str], opened: Sequence[tuple[Checkpoint, CheckpointWeights]]
    ) -> Iterator[tuple[tuple[Projection, ...], str, tuple[Checkpoint, CheckpointWeights], SpectralTracker]]:
        """Each stack with each checkpoint that lacks some of it, and the tracker of the stack."""
        for stack in self.stacks:
            names = {projection.name for projection in stack}
            wanted = [i for i, label in enumerate(labels) if names & self.table.missing(label)]
            if not wanted:
                continue
            tracker = SpectralTracker(self._basis(stack), engine=self.engine, arrays=False)
            for i in wanted:
                yield stack, labels[i], opened[i], tracker

    def _basis(self, stack: Sequence[Projection]) -> SpectralBasis:
        matrices = [
            reference_matrix(projection.name, weight, self.rank, self.cache_dir)
            for projection, weight in self.weights.stream(stack)
        ]
        devices = {p.name: self.device for p in stack}
        return SpectralBasis(stack, matrices, self.rank, devices=devices)

    def _rows(
        self, tracker: SpectralTracker, checkpoint: Checkpoint, weights: CheckpointWeights
    ) -> list[dict[str, Any]]:
        try:
            record = tracker.measure(weights, step=0, stage=checkpoint.stage, null_draws=self.null_draws)
        except TensorError as error:
            raise TensorError(_told(checkpoint.path, error)) from None
        return [{**row, "step": checkpoint.step} for row in record.rows]

    def _checked(self, checkpoint: Checkpoint) -> CheckpointWeights:
        """Open a checkpoint and see from its headers that it has every matrix in the base's shape."""
        weights = checkpoint.open(self.base)
        shapes = weights.shapes()
        for projection in (p for stack in self.stacks for p in stack):
            try:
                found = shapes[find_tensor(projection.tensor, shapes, weights.where)]
            except TensorError as error:
                raise TensorError(_told(checkpoint.path, error)) from None
            wanted = self.shapes[projection.tensor]
            if tuple(found) != tuple(wanted):
                raise TensorError(
                    f"{checkpoint.path}: {projection.tensor} is {tuple(found)}, the base's is {tuple(wanted)}; "
                    "is that its base?"
                )
        return weights


def _told(path: Path, error: RlspecError) -> str:
    """The message, with the checkpoint in front where it does not say it."""
    return str(error) if str(path) in str(error) else f"{path}: {error}"
