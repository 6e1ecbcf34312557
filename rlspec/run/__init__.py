"""The store of a run: its settings, its folder, the rows of its events. :class:`TrackConfig` and :class:`RunFolder`
are light."""

from __future__ import annotations

from rlspec.run.config import TrackConfig
from rlspec.run.folder import RunFolder

__all__ = ["RunFolder", "TrackConfig"]
