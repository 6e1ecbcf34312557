"""`rlspec study`: run a plan to its end, write the table, say what was found."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rlspec.errors import MissingPackageError
from rlspec.jobs.loading import check_checkpoint, model_folder
from rlspec.study.findings import sections
from rlspec.study.folder import StudyFolder
from rlspec.study.page import write_page
from rlspec.study.plans import StudyOptions, make_study
from rlspec.study.runner import Here, Pool, Processes, run_study
from rlspec.study.table import write_tables


@dataclass(frozen=True)
class Places:
    """Where cells run; none of it is a setting of the study."""

    executor: str = "local"
    workers: int = 1
    threads: int | None = None  # of each cell; None: a fair share of this machine's
    slurm: Mapping[str, str] = field(default_factory=dict)


def run_plan(plan: str, options: StudyOptions, seeds: Sequence[int], out: Path, places: Places) -> list[str]:
    """Run what is missing of a plan in a folder, write table and page; returns what was found, in lines.

    Raises:
        RlspecError: bad input of any kind, or a folder that holds something else.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished is kept.
    """
    check_checkpoint(model_folder(options.model))
    if places.executor == "slurm" and importlib.util.find_spec("submitit") is None:
        raise MissingPackageError("a study on a Slurm cluster", "submitit", extra="slurm")
    folder = StudyFolder(out)
    begun = (out / "study.json").is_file()
    share = folder.study().threads if begun else max(1, torch.get_num_threads() // places.workers)
    threads = places.threads or share
    study = replace(make_study(plan, options, seeds), threads=threads)
    run_study(study, folder, lambda: _pool(out, places, threads))
    write_tables(study, folder)
    found = sections(study, folder)
    write_page(study, folder, found)
    told = [line for section in found for line in textwrap.wrap(section.text, 110)]
    return [*told, "", f"table   {out / 'table.csv'}", f"page    {out / 'report.html'}"]


def _pool(out: Path, places: Places, threads: int) -> Pool:
    if places.executor == "slurm":
        from rlspec.study.slurm import Cluster

        return Cluster(out / "slurm", places.workers, threads, places.slurm)
    return Here(threads) if places.workers == 1 else Processes(places.workers, threads)
