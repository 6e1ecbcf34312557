"""Measure checkpoints on disk against their base: matrix by matrix, whatever their size.

The outer loop goes over stacks of matrices, the inner one over checkpoints. So each matrix of the base is decomposed
once however many checkpoints there are, and no more is held than one stack needs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch

from rlspec.backend import choose_device
from rlspec.errors import CheckpointError, OptionError, TensorError
from rlspec.io.counterparts import Names
from rlspec.io.heads import split_heads
from rlspec.io.projections import Projection, find_projections, parse_modules
from rlspec.io.share import ALONE, APART, LOOK, Share
from rlspec.io.weights import Weights, find_tensor, open_weights
from rlspec.jobs.series.checkpoints import Checkpoint, Files, find_checkpoints
from rlspec.jobs.series.evaluation import Evaluate
from rlspec.jobs.series.result import Series
from rlspec.jobs.series.scores import Scorer
from rlspec.jobs.series.stacks import stacks
from rlspec.jobs.series.table import SpectraTable
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.rank import Rank, RankLike
from rlspec.restore.estimate import memory_bytes
from rlspec.spectra.basis import SpectralBasis, reference_matrices
from rlspec.spectra.processes import ProcessError, dealt
from rlspec.spectra.tracker import Ends, Engine, SpectralTracker

#: called with (matrices measured, matrices in all, checkpoint, matrix)
OnMatrix = Callable[[int, int, str, str], None]


def measure(
    base: str | Path,
    checkpoints: str | Path | Iterable[str | Path],
    *,
    out: str | Path | None = None,
    modules: str | Iterable[str] = ("q", "k", "v"),
    rank: RankLike = 0.2,
    per_head: bool = False,
    engine: Engine = "delta",
    null_draws: int = 0,
    full_spectrum: bool = False,
    locking: bool = False,
    device: torch.device | str = "auto",
    memory_gib: float = 4.0,
    cache_dir: str | Path | None = None,
    evaluate: Evaluate | None = None,
    texts: str | Path | None = None,
    prompts: str | Path | None = None,
    on_matrix: OnMatrix | None = None,
    share: Share | None = None,
) -> Series:
    """The spectra of checkpoints on disk against those of their base, and scores beside them.

    Args:
        base: the reference, a safetensors checkpoint: a folder in the layout of Hugging Face (a snapshot in its cache is
            one), or a file.
        checkpoints: such folders or files, folders that torch.distributed.checkpoint wrote (those of accelerate's FSDP
            below them, too), LoRA adapters of PEFT (measured as W + s B A, by their factors), and folders of those.
        out: folder for ``spectra.jsonl``. What is in its table already is not measured again; an interrupted series goes
            on. None keeps the rows in memory alone.
        modules, rank, per_head, engine, null_draws, device: see ``SpectralBasis.from_checkpoint``, ``SpectralTracker``.
        full_spectrum: see ``SpectralTracker.measure``.
        locking: say of each checkpoint how much of its leading subspaces is that of the table's last one, whose own are
            found first, matrix by matrix. Where the series has grown and ends in another one, the checkpoints given are
            measured anew; ``locking_end`` tells which one a row was compared with.
        memory_gib: bound on tensors and decompositions that are held at once on the host, GiB.
        cache_dir: where the base's decompositions are kept; default ``$RLSPEC_CACHE`` or ``~/.cache/rlspec``.
        evaluate: scores each checkpoint: a function from its path to named scores (see
            ``rlspec.tasks.scores.read_scores``), or a command in which ``{checkpoint}`` stands for the path and that
            prints them as JSON. Where ``out`` is gone on with, what it found counts again: a command is known by its
            words and a function by its name; lambdas, partial functions and methods are asked anew.
        texts: a JSONL file with a ``text`` on each line, for the scores ``text_loss`` (mean token loss, nats; of the
            base, too) and ``forgetting`` (what it is above the base's).
        prompts: a JSONL file of prompts, with or without answers, for the score ``kl_base`` (KL(base || checkpoint), nats
            per token of the answers; those that lack are sampled from the base). The base is held beside the checkpoint.
        on_matrix: called after every matrix of every checkpoint that this process measures.
        share: which process this is of several that call this with the same arguments, each for its stacks of matrices.
            ``out`` is what they have in common; the first ends when all have. None is one process.

    Returns:
        All checkpoints that are whole in the table, in the order of their steps: those of earlier calls with the same
        ``out``, too. Scores are in its ``scores``, what goes with them in its ``correlations()``. Where several
        processes measure, the first one's is the table, with the bytes of one process.

    Raises:
        CheckpointError: a checkpoint is not there, not whole, malformed, or in a format that is not read.
        ProjectionError, TensorError: a matrix is missing, of another shape than the base's, or holds NaN or infinity.
        OptionError: an argument out of range, less memory than one matrix takes, or an evaluation that fails.
        RunFolderError: ``out`` holds rows measured otherwise, or is in use.
        ProcessError: another process has ended before its rows were there. The same call goes on.
    """
    given = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    scorer = Scorer(base, out, evaluate=evaluate, texts=texts, prompts=prompts, device=device)
    scorer.check(given)
    job = Job.open(
        base,
        out=out,
        modules=modules,
        rank=rank,
        per_head=per_head,
        engine=engine,
        null_draws=null_draws,
        full_spectrum=full_spectrum,
        locking=locking,
        device=device,
        memory_gib=memory_gib,
        cache_dir=cache_dir,
        share=share or ALONE,
    )
    try:
        series = job.series(given, on_matrix)
        return scorer.score(series) if job.share.number == 0 else series
    finally:
        job.table.close()


@dataclass(frozen=True)
class _End:
    """The last checkpoint of a series."""

    label: str
    checkpoint: Checkpoint
    weights: Weights


@dataclass(frozen=True)
class Job:
    """The base, what is measured and how, and the table of what was; see :func:`measure`."""

    base: Path
    weights: Weights
    stacks: tuple[tuple[Projection, ...], ...]
    shapes: dict[str, tuple[int, ...]]
    rank: Rank
    engine: Engine
    null_draws: int
    full_spectrum: bool
    locking: bool
    device: torch.device
    cache_dir: str | Path | None
    table: SpectraTable
    share: Share
    opened: float  #: ``time.monotonic()``

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
        per_head: bool = False,
        full_spectrum: bool = False,
        locking: bool = False,
        cache_dir: str | Path | None = None,
        share: Share = ALONE,
    ) -> Job:
        """Check the arguments, read the base's headers and open the table."""
        if engine not in get_args(Engine):
            raise OptionError(f"unknown engine {engine!r}; valid: {', '.join(get_args(Engine))}")
        if isinstance(null_draws, bool) or not isinstance(null_draws, int) or null_draws < 0:
            raise OptionError(f"null_draws={null_draws!r} must be a whole number, at least 0")
        memory = memory_bytes(memory_gib)
        rule, wanted, place = Rank.parse(rank), parse_modules(modules), Path(base)
        chosen = share.device(choose_device(device))
        if out is None and share.count > 1:
            raise OptionError(f"out=None: {share.count} processes need a folder that all of them see")
        if out is not None and Path(out).resolve() == place.resolve():
            raise OptionError(f"out={str(out)!r} is the base, which is never written to")
        weights = open_weights(place)
        shapes = weights.shapes()
        projections = find_projections(shapes, wanted, weights.config())
        if per_head:
            projections = split_heads(projections, shapes, weights.config())
        # Several processes deal stacks to each other, and small ones come out even.
        together = torch.get_num_threads() + 1 if share.count == 1 else 1
        parts = stacks(
            projections,
            shapes,
            memory,
            memory_gib,
            rank=rule,
            device=chosen,
            parts=together,
            locking=locking,
            nulls=null_draws > 0,
        )
        settings = {
            "base": str(place.resolve()),
            "base_files": Checkpoint.at(place).files(),
            "modules": list(wanted),
            "rank": str(rule),
            "per_head": per_head,
            "engine": engine,
            "null_draws": null_draws,
            "full_spectrum": full_spectrum,
            "locking": locking,
        }
        names = [projection.name for projection in projections]
        table = SpectraTable(None if out is None else Path(out), settings, names, share)
        return cls(
            place,
            weights,
            parts,
            shapes,
            rule,
            engine,
            null_draws,
            full_spectrum,
            locking,
            chosen,
            cache_dir,
            table,
            share,
            time.monotonic(),
        )

    def series(self, paths: Iterable[str | Path], on_matrix: OnMatrix | None = None) -> Series:
        """Measure the checkpoints at the paths, and wait for other processes; returns the table in order."""
        try:
            labels = self.measure(find_checkpoints(paths), on_matrix)
            self.wait_for_others(labels)
        finally:
            series = self.table.settle()
        return series

    @pinned_arithmetic()
    def measure(self, checkpoints: Sequence[Checkpoint], on_matrix: OnMatrix | None = None) -> list[str]:
        """Measure what the table lacks of these checkpoints; returns their labels."""
        opened = self._opened(checkpoints)
        if self.table.is_one_of(checkpoints):
            raise OptionError("out= is one of the checkpoints, which are never written to")
        entries: list[tuple[Checkpoint, Files]] = [
            (checkpoint, checkpoint.files()) for checkpoint in checkpoints
        ]
        labels = self.table.add(entries)
        end = self._end(dict(zip(labels, opened))) if self.locking and labels else None
        if end is not None:
            self.table.drop_outdated(labels, end.label)
        mine = {name for name, owner in self._owners.items() if owner == self.share.number}
        total = sum(len(self.table.missing(label) & mine) for label in labels)
        done = 0
        for stack, label, (checkpoint, weights), tracker, last in self._to_do(labels, opened, end):
            lacking = self.table.missing(label)
            rows = self._rows(tracker, checkpoint, weights, last)
            if end is not None:
                rows = [{**row, "locking_end": end.label} for row in rows]
            self.table.put(label, rows)
            del tracker, last  # of which the next stack's take the room
            for projection in stack:
                if projection.name in lacking:
                    done += 1
                    if on_matrix is not None:
                        on_matrix(done, total, label, projection.name)
        return labels

    def _to_do(
        self, labels: Sequence[str], opened: Sequence[tuple[Checkpoint, Weights]], end: _End | None
    ) -> Iterator[
        tuple[tuple[Projection, ...], str, tuple[Checkpoint, Weights], SpectralTracker, Ends | None]
    ]:
        """Each stack with each checkpoint that lacks some of it, the stack's tracker and its subspaces at the end."""
        for stack in self.stacks:
            if self._owners[stack[0].name] != self.share.number:
                continue
            names = {projection.name for projection in stack}
            wanted = [i for i, label in enumerate(labels) if names & self.table.missing(label)]
            if not wanted:
                continue
            tracker = SpectralTracker(self._basis(stack), engine=self.engine, arrays=False)
            last = None
            if end is not None:
                with _named(end.checkpoint.path):
                    last = tracker.subspaces(end.weights)
            for i in wanted:
                yield stack, labels[i], opened[i], tracker, last
            del tracker, last

    def _end(self, opened: Mapping[str, tuple[Checkpoint, Weights]]) -> _End:
        """The checkpoint that ends the series, also where it is not among those given."""
        label, checkpoint = self.table.last()
        if label in opened:
            return _End(label, *opened[label])
        try:
            weights = self._checked(checkpoint)
            self.table.check_last(checkpoint.files())
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} (locking=True compares with {label}, the last checkpoint of the table)"
            ) from None
        return _End(label, checkpoint, weights)

    @cached_property
    def _owners(self) -> dict[str, int]:
        """Which process measures each matrix: the same one whatever is measured already."""
        sides = [stack[0].shape(self.shapes[stack[0].tensor]) for stack in self.stacks]
        costs = [m * n * min(m, n) * len(stack) for (m, n), stack in zip(sides, self.stacks)]
        owners = dealt(costs, self.share.count)
        return {p.name: owner for stack, owner in zip(self.stacks, owners) for p in stack}

    def wait_for_others(self, labels: Sequence[str]) -> None:
        """In the first of several processes: until the others' rows of these checkpoints are in the table.

        Raises:
            ProcessError: one has ended without them; those that live have finished.
        """
        if self.share.number > 0 or self.share.count == 1:
            return
        seen: set[int] = set()
        while True:
            late = time.monotonic() - self.opened > APART
            held = self.table.take_in()
            seen |= held
            lacking = Counter(self._owners[name] for label in labels for name in self.table.missing(label))
            if not lacking:
                return
            if all(number not in held and (late or number in seen) for number in lacking):
                told = ", ".join(
                    f"process {number} ({rows} rows)" for number, rows in sorted(lacking.items())
                )
                raise ProcessError(
                    f"of {self.share.count} processes these have ended before their part was measured: {told}; what is "
                    "measured is kept, the same command goes on"
                )
            time.sleep(LOOK)

    def _basis(self, stack: Sequence[Projection]) -> SpectralBasis:
        matrices = reference_matrices(self.weights.stream(stack), self.rank, self.cache_dir, count=len(stack))
        devices = {p.name: self.device for p in stack}
        return SpectralBasis(stack, matrices, self.rank, devices=devices)

    def _rows(
        self, tracker: SpectralTracker, checkpoint: Checkpoint, weights: Weights, end: Ends | None
    ) -> list[dict[str, Any]]:
        with _named(checkpoint.path):
            record = tracker.measure(
                weights,
                step=0,
                stage=checkpoint.stage,
                null_draws=self.null_draws,
                full_spectrum=self.full_spectrum,
                end=end,
            )
        return [{**row, "step": checkpoint.step} for row in record.rows]

    def _opened(self, checkpoints: Sequence[Checkpoint]) -> list[tuple[Checkpoint, Weights]]:
        """Each with its weights, once all are known to be fit: a series that lacks one is no series."""
        found, first = [], None
        for checkpoint in checkpoints:
            try:
                found.append((checkpoint, self._checked(checkpoint)))
            except (CheckpointError, TensorError) as error:
                first = first or error
        if first is None:
            return found
        if not found:
            raise first
        raise type(first)(
            f"{first}; {len(found)} of {len(checkpoints)} checkpoints can be measured: give those by name, or, where a "
            "trainer still writes to the folder, follow it with `rlspec measure` (watch=True), which passes over what is "
            "not whole"
        )

    def _checked(self, checkpoint: Checkpoint) -> Weights:
        """Open a checkpoint and see from its headers that it has every matrix in the base's shape; its tensors come where
        they are measured."""
        weights = checkpoint.open(self.base).on(self.device)
        shapes = weights.shapes()
        names = Names(shapes)
        for projection in (p for stack in self.stacks for p in stack):
            with _named(checkpoint.path):
                found = shapes[find_tensor(projection.tensor, names, weights.where)]
            wanted = self.shapes[projection.tensor]
            if tuple(found) != tuple(wanted):
                raise TensorError(
                    f"{checkpoint.path}: {projection.tensor} is {tuple(found)}, the base's is {tuple(wanted)}; "
                    "is that its base?"
                )
        return weights


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Context that puts the checkpoint in front of a TensorError that does not say it."""
    try:
        yield
    except TensorError as error:
        raise TensorError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
