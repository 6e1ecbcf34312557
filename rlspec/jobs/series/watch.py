"""Follow folders that somebody else's trainer fills, and measure each checkpoint once it is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from rlspec.errors import CheckpointError, ProjectionError, TensorError
from rlspec.io.index import distributed_format
from rlspec.jobs.series.checkpoints import (
    Checkpoint,
    Files,
    checkpoints_below,
    find_checkpoints,
    foreign_below,
)
from rlspec.jobs.series.job import Job, OnMatrix
from rlspec.jobs.series.table import TableError

#: Seconds between two looks. A checkpoint is whole when all its files are there and have not changed between them.
INTERVAL = 10.0


def watch(
    job: Job,
    paths: Sequence[str | Path],
    *,
    interval: float = INTERVAL,
    on_matrix: OnMatrix | None = None,
    warn: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[list[str]]:
    """Measure the checkpoints at the paths and those that appear there, for ever.

    A checkpoint that cannot be measured is told of, and passed over until it is written anew; so is one that vanishes
    while it is read, as trainers remove old ones. One for which the device has no memory left, as beside a trainer, is
    told of and tried again at each look. Models in formats that are not read are told of once.

    Args:
        job: opened, see :class:`Job`.
        paths: folders, which may be empty still, and checkpoints.
        on_matrix: see ``measure``.
        warn: gets one line for each checkpoint that is passed over.

    Yields:
        The labels that a look has added to the table, whose rows are then in order on disk.

    Raises:
        CheckpointError: no folder at a path, or the table cannot be written.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise CheckpointError(f"{path}: no such folder to watch")
    before: dict[Path, Files] = {}
    passed_over: dict[Path, Files | None] = {}
    waiting: set[Path] = set()

    def pass_over(checkpoint: Checkpoint, files: Files | None, message: str) -> None:
        passed_over[checkpoint.path] = files
        warn(message)

    def pickled(checkpoint: Checkpoint) -> bool:
        """Whether pickles are all that comes: a model's, which have not changed since the last look."""
        try:
            files = checkpoint.pickles()
        except CheckpointError:  # one vanished
            files = {}
        still = bool(files) and before.get(checkpoint.path) == files
        before[checkpoint.path] = files
        return still

    def measured(ready: list[tuple[Checkpoint, Files]]) -> list[str]:
        """Together, so that the base is decomposed once; one by one where that fails."""
        try:
            return job.measure([checkpoint for checkpoint, _ in ready], on_matrix)
        except TableError:
            raise
        except (CheckpointError, ProjectionError, TensorError, torch.OutOfMemoryError) as error:
            if len(ready) > 1:
                return [label for one in ready for label in measured([one])]
            ((checkpoint, files),) = ready
            if isinstance(error, torch.OutOfMemoryError):
                if checkpoint.path not in waiting:
                    waiting.add(checkpoint.path)
                    warn(f"{checkpoint.path}: until there is room: {str(error).partition('. ')[0]}")
                return []
            label = job.table.label_of(checkpoint)
            if label is not None and job.table.missing(label):
                job.table.forget(label)
            pass_over(checkpoint, files, str(error))
            return []

    while True:
        ready = []
        for checkpoint in _look(paths):
            try:
                files = checkpoint.files()
            except CheckpointError as error:
                told = distributed_format(checkpoint.path)
                if told is None and pickled(checkpoint):
                    told = str(error)
                if told is not None and checkpoint.path not in passed_over:
                    pass_over(checkpoint, None, told)
                continue  # of all else the rest may still come
            still = before.get(checkpoint.path) == files
            before[checkpoint.path] = files
            if (
                still
                and passed_over.get(checkpoint.path) != files
                and not job.table.is_whole(checkpoint, files)
            ):
                ready.append((checkpoint, files))
        for place, files, told in (found for path in paths for found in foreign_below(Path(path))):
            if before.get(place) == files and place not in passed_over:
                passed_over[place] = None
                warn(told)
            before[place] = files
        if ready and (added := measured(ready)):
            job.table.settle()
            yield added
        sleep(interval)


def _look(paths: Sequence[str | Path]) -> list[Checkpoint]:
    """What is there now."""
    found: dict[Path, Checkpoint] = {}
    for path in map(Path, paths):
        try:
            there = find_checkpoints([path])
        except (CheckpointError, FileNotFoundError):  # nothing yet, or half of it
            there = checkpoints_below(path)
        found.update({checkpoint.path: checkpoint for checkpoint in there})
    return list(found.values())
