"""The spectra of checkpoints on disk, one after the other, against their base."""

from __future__ import annotations

from rlspec.jobs.series.job import measure
from rlspec.jobs.series.result import CheckpointSpectra, Series

__all__ = ["CheckpointSpectra", "Series", "measure"]
