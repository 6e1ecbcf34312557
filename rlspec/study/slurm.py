"""Cells as jobs of a Slurm cluster, by submitit. The study's folder must lie where the nodes see it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlspec.study.cells import Cell
from rlspec.study.work import run_cell

_POLL = 2.0  # seconds between looks at the queue


class Cluster:
    """At most ``slots`` jobs at once, each of one cell.

    Args:
        folder: for submitit's files.
        options: parameters of submitit's executor; a name that it does not know is Slurm's own, as in ``partition``.
        cluster: which of submitit's; "debug" and "local" need no Slurm.
    """

    def __init__(
        self, folder: Path, slots: int, threads: int, options: Mapping[str, str], cluster: str = "slurm"
    ) -> None:
        import submitit

        self.slots, self.threads = slots, threads
        self._jobs: list[Any] = []
        self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        known: dict[str, Any] = {"cpus_per_task": threads, "timeout_min": 240, "name": "rlspec"}
        for name, value in options.items():
            own = name in ("timeout_min", "mem_gb", "name", "cpus_per_task")
            known[name if own else f"slurm_{name}"] = int(value) if value.isdigit() else value
        self._executor.update_parameters(**known)

    def submit(self, folder: Path, cell: Cell) -> Any:
        job = self._executor.submit(run_cell, folder.resolve(), cell.digest, self.threads)
        self._jobs.append(job)
        return job

    def ended(self, jobs: Iterable[Any]) -> list[Any]:
        while True:
            found = [job for job in jobs if job.done()]
            if found:
                return found
            time.sleep(_POLL)

    def stop(self) -> None:
        for job in self._jobs:
            if not job.done():
                job.cancel()
