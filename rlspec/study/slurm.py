"""Cells as jobs of a Slurm cluster, by submitit. The study's folder must lie where the nodes see it."""

from __future__ import annotations

import getpass
import pickle
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlspec.errors import JobError, OptionError
from rlspec.study.cells import Cell
from rlspec.study.folder import StudyFolder
from rlspec.study.runner import describe
from rlspec.study.work import run_cell

_POLL = 2.0  # seconds between looks at the queue
# Looks at a queue without a job, until its files too must have come through a network's file system: by its defaults
# NFS goes on to say for half a minute that there is no such file.
_GONE = 20


@dataclass(eq=False)
class _Job:
    """A cell on the cluster. ``missed`` counts the looks at the queue that did not show it."""

    submitted: Any
    folder: StudyFolder
    cell: Cell
    missed: int = 0

    def left_something(self) -> bool:
        return self.folder.finished(self.cell.digest) or self.submitted.paths.result_pickle.exists()

    def result(self) -> None:
        """Raises:
        JobError: the cell is not finished.
        """
        if self.folder.finished(self.cell.digest):
            return
        job = self.submitted
        why = "was ended by the cluster (cancelled, or out of time or memory)"
        if job.paths.result_pickle.exists():
            _, trace = pickle.loads(job.paths.result_pickle.read_bytes())
            why = f"failed, {str(trace).strip().splitlines()[-1]}"
        raise JobError(
            f"{describe(self.folder, self.cell)}: job {job.job_id} {why}; its log is {job.paths.stderr}. "
            "What is finished is kept. To go on: the same command"
        )


class Cluster:
    """At most ``slots`` jobs at once, each of one cell.

    Jobs are looked for in Slurm's queue (``squeue``) and not in its accounts (``sacct``), which not every cluster keeps.

    Args:
        folder: for submitit's files.
        options: parameters of submitit's executor; a name that it does not know is Slurm's own, as in ``partition``.
        cluster: which of submitit's; "debug" and "local" need no Slurm.

    Raises:
        OptionError: this machine has no Slurm.
    """

    def __init__(
        self, folder: Path, slots: int, threads: int, options: Mapping[str, str], cluster: str = "slurm"
    ) -> None:
        import submitit

        self.slots, self.threads = slots, threads
        self._jobs: list[_Job] = []
        self._queued = cluster == "slurm"
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        except RuntimeError as error:
            raise OptionError(f"executor='slurm': {error}") from error
        known: dict[str, Any] = {"cpus_per_task": threads, "timeout_min": 240, "name": "rlspec"}
        for name, value in options.items():
            own = name in ("timeout_min", "mem_gb", "name", "cpus_per_task")
            known[name if own else f"slurm_{name}"] = int(value) if value.isdigit() else value
        self._executor.update_parameters(**known)

    def submit(self, folder: Path, cell: Cell) -> _Job:
        submitted = self._executor.submit(run_cell, folder.resolve(), cell.digest, self.threads)
        self._jobs.append(_Job(submitted, StudyFolder(folder), cell))
        return self._jobs[-1]

    def ended(self, jobs: Iterable[_Job]) -> list[_Job]:
        jobs = list(jobs)
        while True:
            queue = _queue() if self._queued else None
            for job in jobs:
                if queue is not None:
                    job.missed = 0 if job.submitted.job_id in queue else job.missed + 1
            found = [job for job in jobs if self._has_ended(job)]
            if found:
                return found
            time.sleep(_POLL)

    def _has_ended(self, job: _Job) -> bool:
        if not self._queued:
            return bool(job.submitted.done())
        return job.left_something() or job.missed >= _GONE

    def stop(self) -> None:
        for job in self._jobs:
            if not self._has_ended(job):
                job.submitted.cancel(check=False)


def _queue() -> set[str] | None:
    """Numbers of this user's jobs that wait or run; None where Slurm does not answer, as while it is restarted."""
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-o", "%A", "-u", getpass.getuser()],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return set(asked.stdout.split())
