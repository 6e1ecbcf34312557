"""Studies: many runs with shared parents, resumable, that end in one table with statistics and a page."""

from __future__ import annotations
