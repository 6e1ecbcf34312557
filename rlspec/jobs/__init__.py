"""What the commands do: a training run that is tracked, an evaluation. :func:`run_track` imports torch when called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlspec.run.config import TrackConfig

__all__ = ["run_track"]


def run_track(
    config: TrackConfig,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    stages: Mapping[str, Callable[..., Any]] | None = None,
) -> Path:
    """See :func:`rlspec.jobs.track.run_track`."""
    from rlspec.jobs import track

    return track.run_track(config, out, resume=resume, stages=stages)
