"""TensorBoard events of a run, written from its metrics rows where TensorBoard is installed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from rlspec.run.jsonl import Row
from rlspec.run.manifest import Manifest

_SPECTRA = ("angle_left_mean_rad", "angle_right_mean_rad", "sigma_change_rel_max", "delta_relative")
# Columns of a metrics row that place it rather than measure something.
_PLACE = ("step", "global_step")

MISSING = "no TensorBoard events: pip install 'rlspec[tensorboard]' for them; everything else is written"


def installed() -> bool:
    """Whether events can be written."""
    return find_spec("tensorboard") is not None


class TensorBoardLog:
    """Scalars on the run's one step axis (`global_step`).

    The event file is written anew from the rows of the events so far, because TensorBoard's files cannot be cut
    back: a resumed run leaves no doubled or stale points. Event files of others in the folder stay. Without TensorBoard
    nothing is written, and nothing fails.
    """

    def __init__(
        self, folder: Path, metrics: Iterable[Row], spectra: Iterable[Row], manifest: Manifest
    ) -> None:
        self._writer: Any = None
        if not installed():
            return
        from torch.utils.tensorboard import SummaryWriter

        for path in manifest.paths(folder):
            if not manifest.changed(path):
                manifest.remove(path)
        folder.mkdir(exist_ok=True)
        others = set(folder.iterdir())
        self._writer = SummaryWriter(str(folder))
        for path in set(folder.iterdir()) - others:
            manifest.record(path)
        by_event: dict[tuple[str, int], list[Row]] = defaultdict(list)
        for row in spectra:
            by_event[row["stage"], row["step"]].append(row)
        for row in metrics:
            self.add(row, by_event[row["stage"], row["step"]])

    def add(self, metrics: Row, spectra: Iterable[Row]) -> None:
        """Write one event: each number of its metrics row, and the mean spectral figures of each module."""
        if self._writer is None:
            return
        stage, step = metrics["stage"], metrics["global_step"]
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name not in _PLACE:
                self._writer.add_scalar(f"{_group(name)}/{name}", value, step)
        by_module: dict[str, list[Row]] = defaultdict(list)
        for row in spectra:
            by_module[row["module"]].append(row)
        for module, rows in by_module.items():
            for name in _SPECTRA:
                values = [row[name] for row in rows if row.get(name) is not None]
                if values:
                    self._writer.add_scalar(f"spectra_{module}/{name}", fmean(values), step)
        self._writer.add_text("stage", f"{stage} {metrics['step']}", step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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
