"""The main job: train, track and evaluate into one run folder.

:class:`TrackConfig` and :class:`RunFolder` are light; :func:`run_track` imports torch when it is called.
"""

from __future__ import annotations

from pathlib import Path

from rlspec.run.config import TrackConfig
from rlspec.run.folder import RunFolder

__all__ = ["RunFolder", "TrackConfig", "run_track"]


def run_track(config: TrackConfig, out: Path | str | None = None, *, resume: bool = False) -> Path:
    """See :func:`rlspec.run.experiment.run_track`."""
    from rlspec.run import experiment

    return experiment.run_track(config, out, resume=resume)
