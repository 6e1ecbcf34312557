"""TensorBoard events of a run, written from its metrics rows where TensorBoard is installed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from rlspec.io.jsonl import Row
from rlspec.run.manifest import Manifest
from rlspec.run.segments import Event, event_of, segment_of

_SPECTRA = ("angle_left_mean_rad", "angle_right_mean_rad", "sigma_change_rel_max", "delta_relative")
# Columns of a metrics row that place it rather than measure something.
_PLACE = ("step", "global_step", "parent_step")

MISSING = "no TensorBoard events: pip install 'rlspec[tensorboard]' for them; everything else is written"


def installed() -> bool:
    """Whether events can be written."""
    return find_spec("tensorboard") is not None


class TensorBoardLog:
    """Scalars on the run's one step axis (`global_step`), in one folder per segment: TensorBoard draws each as a curve
    of its own, and a branch leaves the trunk where it began.

    The event files are written anew from the rows of the events so far, because TensorBoard's files cannot be cut
    back: a resumed run leaves no doubled or stale points. Event files that the manifest does not name stay, and
    TensorBoard shows the new ones in their place. Without TensorBoard nothing is written, and nothing fails.
    """

    def __init__(
        self, folder: Path, metrics: Iterable[Row], spectra: Iterable[Row], manifest: Manifest
    ) -> None:
        self._folder, self._manifest = folder, manifest
        self._writers: dict[str, Any] = {}
        if not installed():
            return
        for path in manifest.paths(folder):
            if not manifest.changed(path):
                manifest.remove(path)
        by_event: dict[Event, list[Row]] = defaultdict(list)
        for row in spectra:
            by_event[event_of(row)].append(row)
        for row in metrics:
            self.add(row, by_event[event_of(row)])

    def _writer(self, segment: str) -> Any:
        if segment not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / segment
            folder.mkdir(parents=True, exist_ok=True)
            others = set(folder.iterdir())
            # What earlier event files say from step 0 on, TensorBoard then leaves out: runs of before there was a
            # manifest have theirs here, which nobody can tell from those of others.
            self._writers[segment] = SummaryWriter(str(folder), purge_step=0 if others else None)
            for path in set(folder.iterdir()) - others:
                self._manifest.record(path)
        return self._writers[segment]

    def add(self, metrics: Row, spectra: Iterable[Row]) -> None:
        """Write one event: each number of its metrics row, and the mean spectral figures of each module."""
        if not installed():
            return
        writer = self._writer(segment_of(metrics))
        stage, step = metrics["stage"], metrics["global_step"]
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name not in _PLACE:
                writer.add_scalar(f"{_group(name)}/{name}", value, step)
        by_module: dict[str, list[Row]] = defaultdict(list)
        for row in spectra:
            by_module[row["module"]].append(row)
        for module, rows in by_module.items():
            for name in _SPECTRA:
                values = [row[name] for row in rows if row.get(name) is not None]
                if values:
                    writer.add_scalar(f"spectra_{module}/{name}", fmean(values), step)
        writer.add_text("stage", f"{stage} {metrics['step']}", step)
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _group(name: str) -> str:
    for part, group in (
        ("accuracy", "accuracy"),
        ("seconds", "seconds"),
        ("_low", "interval"),
        ("_high", "interval"),
    ):
        if part in name:
            return group
    return "train"
