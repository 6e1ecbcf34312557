"""The spectra of checkpoints on disk, one after the other, against their base."""

from __future__ import annotations

from rlspec.series.job import measure
from rlspec.series.result import CheckpointSpectra, Series

__all__ = ["CheckpointSpectra", "Series", "measure"]
