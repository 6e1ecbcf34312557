"""Figures of rows of spectra.jsonl that a run prints and its report draws."""

from __future__ import annotations

from collections.abc import Iterable

from rlspec.io.jsonl import Row


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there, or None."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def rotation(row: Row) -> float | None:
    """A matrix's rotation: mean principal angle, averaged over the sides where it is defined; radians."""
    return mean((row.get("angle_left_mean_rad"), row.get("angle_right_mean_rad")))
