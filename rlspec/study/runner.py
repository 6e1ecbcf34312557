"""Running a study: cells whose parents are finished, on as many workers as there are, in any order."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from rlspec.errors import JobError
from rlspec.io.lock import let_go, take_lock
from rlspec.run.progress import Progress, eta_text
from rlspec.study.cells import Cell, Study
from rlspec.study.folder import StudyFolder
from rlspec.study.work import run_cell


class Pool(Protocol):
    """Where cells are run."""

    slots: int

    def submit(self, folder: Path, cell: Cell) -> Any:
        """Start a cell, in this process or elsewhere; returns what :meth:`ended` and ``result()`` are asked of."""

    def ended(self, jobs: Iterable[Any]) -> list[Any]:
        """Wait until one or more of the jobs have ended; those."""

    def stop(self) -> None:
        """End what is running; called on every way out."""


class Here:
    """In this process, one at a time."""

    slots = 1

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def submit(self, folder: Path, cell: Cell) -> Future[None]:
        run_cell(folder, cell.digest, self.threads)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def ended(self, jobs: Iterable[Future[None]]) -> list[Future[None]]:
        return list(jobs)

    def stop(self) -> None:
        pass


class Processes:
    """In processes of this machine."""

    def __init__(self, workers: int, threads: int) -> None:
        self.slots, self.threads = workers, threads
        self._pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent
        )

    def submit(self, folder: Path, cell: Cell) -> Future[None]:
        return self._pool.submit(run_cell, folder, cell.digest, self.threads)

    def ended(self, jobs: Iterable[Future[None]]) -> list[Future[None]]:
        return list(wait(list(jobs), return_when=FIRST_COMPLETED).done)

    def stop(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too: what it would still do nobody waits for.

    Ctrl-C is the parent's alone, which then asks for an end. Coming twice it would break off the step, not save it.
    """
    os.setpgrp()
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_study(
    study: Study, folder: StudyFolder, pool: Callable[[], Pool], progress: Progress | None = None
) -> None:
    """Run the cells that are not finished. A cell depends on its settings and its parent's result alone, so the order,
    the workers and interruptions change no result.

    Args:
        pool: makes where to run them; called if anything is to be done.

    Raises:
        RunFolderError: another process runs this study, or the folder holds another one.
        JobError: a worker or a cluster's job ended without finishing its cell.
        RlspecError: what a cell raised; the others that were running are stopped.
    """
    folder.check(study)
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder.path)
    folder.begin(study)
    progress = progress or Progress()
    waiting = [cell for cell in study.cells if not folder.finished(cell.digest)]
    pace = _Pace(folder, study)
    progress.start(f"study {study.plan}", len(study.cells) - len(waiting), len(study.cells))
    place: Pool | None = None
    running: dict[Any, Cell] = {}
    try:
        while waiting or running:
            place = place or pool()
            for cell in list(waiting):
                if len(running) < place.slots and (cell.parent is None or folder.finished(cell.parent)):
                    waiting.remove(cell)
                    running[place.submit(folder.path, cell)] = cell
            for job in place.ended(running):
                cell = running.pop(job)
                try:
                    job.result()
                except BrokenProcessPool as error:
                    raise JobError(
                        f"a worker was killed at {describe(folder, cell)} or beside it, for want of memory perhaps "
                        f"(workers={place.slots}); what is finished is kept. To go on: the same command"
                    ) from error
                done = len(study.cells) - len(waiting) - len(running)
                progress.step(done)
                left = pace.left([*waiting, *running.values()], place.slots)
                progress.say(f"{done}/{len(study.cells)}  {describe(folder, cell)}  {left}".rstrip())
    finally:
        if place is not None:
            place.stop()
        progress.stop()
        let_go(lock)


class _Pace:
    """The time that is left, from what cells of each kind of work have taken."""

    def __init__(self, folder: StudyFolder, study: Study) -> None:
        self.folder, self.study = folder, study

    def left(self, cells: list[Cell], slots: int) -> str:
        taken: dict[str, list[float]] = {}
        for cell in self.study.cells:
            seconds = self.folder.seconds(cell.digest)
            if seconds is not None:
                taken.setdefault(cell.work, []).append(seconds)
        if not cells or not taken:
            return ""
        means = {work: sum(times) / len(times) for work, times in taken.items()}
        unknown = max(means.values())
        seconds = sum(means.get(cell.work, unknown) for cell in cells) / slots
        return eta_text(seconds)


def describe(folder: StudyFolder, cell: Cell) -> str:
    """A cell in one line, with what was found if it is finished."""
    shown = [f"{name} {value}" for name, value in cell.labels.items() if value is not None]
    result = folder.result(cell.digest) if folder.finished(cell.digest) else {}
    figures = [f"{name.upper()} {result[name]:.1%}" for name in ("id", "ood") if name in result]
    return "  ".join([cell.work, *shown, *figures])
