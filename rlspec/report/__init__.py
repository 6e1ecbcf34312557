"""The report of a run: one self-contained HTML page."""

from __future__ import annotations

from rlspec.report.html import write_report

__all__ = ["write_report"]
