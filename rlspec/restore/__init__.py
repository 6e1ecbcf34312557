"""Putting a reference's singular directions or values back: one matrix, or a whole checkpoint."""

from __future__ import annotations

from rlspec.restore.checkpoint import restore_checkpoint
from rlspec.restore.matrix import Mode, RestoreResult, Rounding, restore_matrix
from rlspec.restore.model import restore_
from rlspec.restore.options import RestoreOptions
from rlspec.restore.report import MatrixReport, RestoreReport

__all__ = [
    "MatrixReport",
    "Mode",
    "RestoreOptions",
    "RestoreReport",
    "RestoreResult",
    "Rounding",
    "restore_",
    "restore_checkpoint",
    "restore_matrix",
]
