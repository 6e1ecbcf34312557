"""Putting a reference's singular directions or values back: one matrix, or a whole checkpoint."""

from __future__ import annotations

from rlspec.restore.matrix import Mode, RestoreResult, Rounding, restore_matrix

__all__ = ["Mode", "RestoreResult", "Rounding", "restore_matrix"]
