"""Shares of a matrix's singular directions as counts: one rule for everything that takes a rank."""

from __future__ import annotations


def count_of_share(share: float, r: int) -> int:
    """How many of ``r`` directions a share in (0, 1] is: rounded, ties to even, at least one where there is one."""
    return min(r, max(1, round(share * r)))
