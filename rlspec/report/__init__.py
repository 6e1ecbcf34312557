"""The report of a run: one self-contained HTML page; and of several, compared."""

from __future__ import annotations

from rlspec.report.html import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
