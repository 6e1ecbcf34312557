"""Rows of a matrix some at a time, so that temporaries stay in a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator


def row_blocks(rows: int, width: int, most: int) -> Iterator[slice]:
    """Slices of ``rows`` rows of ``width`` entries each, in order: up to ``most`` entries at once, but a row at least."""
    step = max(1, most // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
