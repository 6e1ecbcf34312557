"""The run folder: what `rlspec track` leaves behind, and what `--resume` starts again from.

::

    config.yaml                        every setting of the run
    metrics.jsonl                      one row per event, written last: a row here means a complete event
    spectra.jsonl                      one row per event and matrix
    evals.jsonl                        one row per event and shift, with the outcome of every deal
    spectra/<segment>-<step>.safetensors   singular values and sines of the angles
    checkpoints/<segment>-<step>/      Hugging Face folders (model and tokenizer)
    resume/<segment>/                  the trainer's own state, or its log where TRL trained
    tb/<segment>/                      TensorBoard events
    written.jsonl                      what of all this the run wrote itself: it removes nothing else
    summary.json, report.html          written at the end

A segment is a stage, or one of the branches of a stage: :mod:`rlspec.run.segments`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from rlspec.errors import RunFolderError
from rlspec.io.files import write_atomically
from rlspec.io.jsonl import Row, append_rows, keep_rows, read_rows, repair
from rlspec.io.lock import let_go, take_lock
from rlspec.run.manifest import Manifest
from rlspec.run.segments import Event, event_of


class RunFolder:
    """One run's folder, held under a lock as long as the object lives (see :meth:`close`).

    Use :meth:`create` for a new run, :meth:`open` for one to continue, and the constructor to only read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = Manifest(self.path)
        self._lock: IO[bytes] | None = None

    @classmethod
    def create(cls, path: Path | str, settings: Mapping[str, Any]) -> RunFolder:
        """Make the folder ``path`` (which must not exist) and write ``settings`` to its config.yaml.

        Raises:
            RunFolderError: Something is already there; it is left untouched.
        """
        folder = cls(path)
        folder.refuse_existing()
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.path.mkdir()
        except FileExistsError:
            folder.refuse_existing()
            raise
        folder._take_lock()
        text = yaml.safe_dump(dict(settings), sort_keys=False)
        write_atomically(folder.config_path, text.encode())
        return folder

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Open the folder of an earlier run to continue it; cut-off last lines are removed.

        Raises:
            RunFolderError: No run is there, or another process is writing to it.
        """
        folder = cls(path)
        folder.settings()
        folder._take_lock()
        for rows in (folder.metrics_path, folder.spectra_path, folder.evals_path):
            repair(rows)
        folder.manifest.repair()
        return folder

    def refuse_existing(self) -> None:
        """Raise RunFolderError if anything is at ``path``."""
        if self.config_path.exists():
            raise RunFolderError(
                f"{self.path} already holds a run; continue it with resume=True, or choose another folder"
            )
        if self.path.exists() or self.path.is_symlink():
            raise RunFolderError(f"{self.path} already exists; choose another folder")

    def _take_lock(self) -> None:
        self._lock = take_lock(self.path)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            let_go(self._lock)
            self._lock = None

    # Paths.
    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def spectra_path(self) -> Path:
        return self.path / "spectra.jsonl"

    @property
    def evals_path(self) -> Path:
        return self.path / "evals.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tb"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def arrays_path(self, segment: str, step: int) -> Path:
        return self.path / "spectra" / f"{segment}-{step}.safetensors"

    def checkpoint_dir(self, segment: str, step: int) -> Path:
        return self.path / "checkpoints" / f"{segment}-{step}"

    def resume_dir(self, segment: str) -> Path:
        return self.path / "resume" / segment

    # Contents.
    @property
    def run_id(self) -> str:
        """What all rows of the run carry, and those of a run with other settings do not."""
        return hashlib.sha256(self.config_path.read_bytes()).hexdigest()[:12]

    def settings(self) -> dict[str, Any]:
        """The settings in config.yaml.

        Raises:
            RunFolderError: There is no config.yaml, or it is not a mapping.
        """
        if not self.config_path.is_file():
            raise RunFolderError(f"{self.path} holds no run to resume (no config.yaml)")
        try:
            settings = yaml.safe_load(self.config_path.read_text())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{self.config_path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(settings, dict):
            raise RunFolderError(f"{self.config_path} is not a mapping of settings")
        return settings

    def metrics(self) -> list[Row]:
        return read_rows(self.metrics_path)

    def spectra(self) -> list[Row]:
        return read_rows(self.spectra_path)

    def evals(self) -> list[Row]:
        return read_rows(self.evals_path)

    def commit(self, metrics: Row, *, spectra: Iterable[Row] = (), evals: Iterable[Row] = ()) -> None:
        """Write one event's rows. The metrics row goes last: once it is there the event is complete."""
        append_rows(self.spectra_path, spectra)
        append_rows(self.evals_path, evals)
        append_rows(self.metrics_path, [metrics])

    def rewind(self, points: Sequence[Event], to_write: Iterable[Path] = ()) -> None:
        """Drop everything later than ``points``, the last step of each segment that the trainer still knows.

        Segments that are not named lose all their events. Incomplete events (no metrics row) go as well, so
        that the continued run writes each row once. Of files, only those go that the run wrote and that are
        as it wrote them.

        Args:
            to_write: checkpoints and array files of all events of the run.

        Raises:
            RunFolderError: Something of the user's is where the continued run would write; nothing was dropped.
        """
        last = dict(points)

        def known(row: Row) -> bool:
            segment, step = event_of(row)
            return step <= last.get(segment, -1)

        complete = {event_of(row) for row in self.metrics() if known(row)}
        kept = {path(*event) for event in complete for path in (self.arrays_path, self.checkpoint_dir)}
        written = self.manifest.paths(self.path / "spectra", self.path / "checkpoints")
        late = [path for path in written if path not in kept]
        for path in late:
            if found := self.manifest.changed(path):
                raise RunFolderError(
                    f"{path}: {found}; the run would write it anew: move it elsewhere to continue"
                )
        for path in to_write:
            if path not in kept and path not in written and os.path.lexists(path):
                raise RunFolderError(
                    f"{path}: the run would write it, and what is there it did not write: move it elsewhere to continue"
                )
        keep_rows(self.metrics_path, known)
        for rows in (self.spectra_path, self.evals_path):
            keep_rows(rows, lambda row: event_of(row) in complete)
        for path in late:
            self.manifest.remove(path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.summary_path, (json.dumps(summary, indent=2) + "\n").encode())

    def summary(self) -> dict[str, Any]:
        return json.loads(self.summary_path.read_text())
