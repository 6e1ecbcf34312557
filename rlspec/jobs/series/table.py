"""The folder of a series: its rows, and of what they are.

::

    measure.json      settings, the base's files, and each checkpoint's path and files; written first
    spectra.jsonl     one row per checkpoint and matrix

Rows are appended as they are measured and put in order when all are there. A kill leaves a table that goes on. Where
several processes measure, all but the first append to parts (`rlspec.jobs.series.parts`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from rlspec.errors import CheckpointError, RunFolderError
from rlspec.io.files import read_json_object, write_atomically, write_error
from rlspec.io.jsonl import Row, append_rows, keep_rows, read_rows, repair, write_rows
from rlspec.io.launch import FirstMissingError
from rlspec.io.lock import is_held, let_go, locked, take_lock
from rlspec.io.share import ALONE, APART, LOOK, Share
from rlspec.jobs.series.checkpoints import Checkpoint, Files, difference, in_order, labels
from rlspec.jobs.series.parts import ended, launch_file, parts, take_part
from rlspec.jobs.series.result import CheckpointSpectra, Series

_VERSION = 1
T = TypeVar("T")


class SpectraTable:
    """Rows by checkpoint and matrix, in memory and, where there is a folder, on disk.

    Args:
        folder: made where it is missing; None for rows in memory alone.
        settings: what every row depends on beside its checkpoint, as JSON has it.
        names: the matrices, in order.
        share: which process of several this is; all but the first wait in :meth:`add` until that has entered the same.

    Raises:
        RunFolderError: the folder holds something else, rows of other settings, or is in use.
        CheckpointError: it cannot be written.
    """

    def __init__(
        self, folder: Path | None, settings: Mapping[str, Any], names: Sequence[str], share: Share = ALONE
    ) -> None:
        self._folder = folder
        self._settings = json.loads(json.dumps(settings))
        self._order = {name: i for i, name in enumerate(names)}
        # label -> path, files, and what it is called where that is another path
        self._known: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, dict[str, Row]] = {}  # label -> matrix -> row
        self._lock: IO[bytes] | None = None
        self._launch: IO[bytes] | None = None
        self._share = share
        self._opened = time.monotonic()
        if folder is not None and share.number == 0:
            self._open(folder)

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / "spectra.jsonl"

    @property
    def _append_to(self) -> Path:
        number = self._share.number
        return self._path if number == 0 else self._path.with_name(f"spectra.part-{number}.jsonl")

    @property
    def _about(self) -> Path:
        assert self._folder is not None
        return self._folder / "measure.json"

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(folder)
            launch_file(folder).unlink(missing_ok=True)  # of a launch that was killed
        except OSError as error:
            raise write_error(folder, error) from None
        try:
            self._read(folder)
            held = self.take_in()
        except BaseException:
            self.close()
            raise
        if held and self._share.count == 1:
            self.close()
            raise RunFolderError(f"{folder} is in use by another rlspec process")

    def _read(self, folder: Path) -> None:
        if not self._about.exists():
            if self._path.exists() or parts(folder):
                raise RunFolderError(f"{self._path}: rows of something else; choose another folder for out=")
            return
        found = read_json_object(self._about, RunFolderError)
        if found.get("version") != _VERSION:
            raise RunFolderError(
                f"{self._about}: of another version of rlspec; choose another folder for out="
            )
        check_settings(self._about, found["settings"], self._settings)
        self._known = found["checkpoints"]
        if self._share.number == 0:
            repair(self._path)
        self._take(self._path)

    def _take(self, path: Path) -> None:
        for row in read_rows(path):
            if row.get("checkpoint") in self._known and row.get("name") in self._order:
                self._rows.setdefault(row["checkpoint"], {})[row["name"]] = row

    def take_in(self) -> set[int]:
        """Move the rows of parts whose process has ended into the table.

        Returns:
            The processes that still write theirs.
        """
        held = set()
        assert self._folder is not None
        for number, path in ended(self._folder):
            if path is None:
                held.add(number)
                continue
            found: dict[str, list[Row]] = {}
            for row in read_rows(path):
                if row.get("checkpoint") in self._known and row.get("name") in self._order:
                    found.setdefault(row.pop("checkpoint"), []).append(row)
            for label, rows in found.items():
                self.put(label, rows)
        return held

    def _join(self, wanted: Sequence[tuple[Checkpoint, Files]]) -> None:
        """Hold this process's part, once the first process has entered the same checkpoints, and read what is there.

        Raises:
            RunFolderError: it does not come (FirstMissingError), or the part is in use.
        """
        folder = self._folder
        assert folder is not None
        while True:
            came = is_held(folder / ".lock")
            if self._about.exists():
                self._read(folder)
                if all(self._holds(checkpoint, files) for checkpoint, files in wanted):
                    break
            if not came and time.monotonic() - self._opened > APART:
                raise FirstMissingError(
                    f"{folder}: process 0 of {self._share.count} has not entered the checkpoints in {APART:.0f} s; do "
                    "all see one file system?"
                )
            time.sleep(LOOK)
        self._lock = take_part(folder, self._share.number)
        repair(self._append_to)
        # Parts before the table: process 0 moves rows from those to that.
        for path in parts(folder).values():
            self._take(path)
        self._take(self._path)

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self._launch is not None:
            assert self._folder is not None
            launch_file(self._folder).unlink(missing_ok=True)
            self._launch.close()
            self._launch = None
        if self._lock is not None:
            let_go(self._lock)
            self._lock = None

    def is_one_of(self, checkpoints: Sequence[Checkpoint]) -> bool:
        """Whether the folder is itself one of these."""
        return self._folder is not None and self._folder.resolve() in {c.path.resolve() for c in checkpoints}

    def label_of(self, checkpoint: Checkpoint) -> str | None:
        """What rows call a checkpoint; None where it is not known."""
        place = str(checkpoint.path.resolve())
        return next((label for label, entry in self._known.items() if entry["path"] == place), None)

    def add(self, checkpoints: Sequence[tuple[Checkpoint, Files]]) -> list[str]:
        """Enter checkpoints, those that are known already too.

        Returns:
            The label of each.

        Raises:
            CheckpointError: one was written anew since it was measured.
        """
        if self._share.number > 0:
            self._join(checkpoints)
            by_path = {entry["path"]: label for label, entry in self._known.items()}
            return [by_path[str(checkpoint.path.resolve())] for checkpoint, _ in checkpoints]
        known = [self._known_as(checkpoint, files) for checkpoint, files in checkpoints]
        names = [self._named(checkpoint, label) for (checkpoint, _), label in zip(checkpoints, known)]
        new = labels(names, {label: self._called(label) for label in self._known})
        found = []
        for (_, files), one, label, fresh in zip(checkpoints, names, known, new):
            place = str(one.path.resolve())
            if label is None:
                label = fresh
            elif label in self._rows:
                self._refuse_rewritten(label, one, files)
            entry = {"path": place, "files": files}
            self._known[label] = entry if str(one.called) == place else {**entry, "called": str(one.called)}
            found.append(label)
        if (folder := self._folder) is not None:
            about = {"version": _VERSION, "settings": self._settings, "checkpoints": self._known}
            self._writing(
                lambda: write_atomically(self._about, (json.dumps(about, indent=2) + "\n").encode())
            )
            if self._share.count > 1 and self._launch is None:
                self._launch = self._writing(lambda: locked(launch_file(folder), b""))
        return found

    def _known_as(self, checkpoint: Checkpoint, files: Files) -> str | None:
        """The label of a checkpoint that is in the table, also where a link to it stands now where it was."""
        if (label := self.label_of(checkpoint)) is not None:
            return label
        moved = (label for label in self._known if self._called(label) == checkpoint.called)
        return next((label for label in moved if self._known[label]["files"] == files), None)

    def _named(self, checkpoint: Checkpoint, label: str | None) -> Checkpoint:
        """The checkpoint by the path that tells most of it: the table's, the one given, or where it lies."""
        if label is not None:
            before = Checkpoint.at(checkpoint.path, self._called(label))
            return checkpoint if before.step is None and checkpoint.step is not None else before
        if checkpoint.called in map(self._called, self._known):  # a link that led to another one then
            return Checkpoint.at(checkpoint.path, checkpoint.path.resolve())
        return checkpoint

    def _called(self, label: str) -> Path:
        entry = self._known[label]
        return Path(entry.get("called", entry["path"]))

    def _in_order(self, labels: Iterable[str]) -> list[tuple[str, Checkpoint]]:
        """Checkpoints of the table with their labels, where they were."""
        by_place = {Path(self._known[label]["path"]): label for label in labels}
        found = in_order(Checkpoint.at(place, self._called(label)) for place, label in by_place.items())
        return [(by_place[checkpoint.path], checkpoint) for checkpoint in found]

    def last(self) -> tuple[str, Checkpoint]:
        """The label of the last checkpoint, and where it was."""
        return self._in_order(self._known)[-1]

    def check_last(self, files: Files) -> None:
        """Refuse files of the last checkpoint that are not those that it had when it was entered.

        Raises:
            CheckpointError: it was written anew.
        """
        self._refuse_rewritten(*self.last(), files)

    def _refuse_rewritten(self, label: str, checkpoint: Checkpoint, files: Files) -> None:
        if told := difference(self._known[label]["files"], files):
            raise CheckpointError(
                f"{checkpoint.path}: written anew since its rows in {self._path} were measured ({told}); choose another "
                "folder for out="
            )

    def drop_outdated(self, labels: Iterable[str], end: str) -> None:
        """Take the rows of these checkpoints for missing that were compared with another end than this one.

        On disk they stay until others are there in their place.
        """
        for label in labels:
            if rows := self._rows.get(label):
                kept = {name: row for name, row in rows.items() if row.get("locking_end") == end}
                self._rows[label] = kept

    def is_whole(self, checkpoint: Checkpoint, files: Files) -> bool:
        """Whether all rows of a checkpoint, with these files, are there."""
        label = self.label_of(checkpoint)
        return label is not None and self._holds(checkpoint, files) and not self.missing(label)

    def _holds(self, checkpoint: Checkpoint, files: Files) -> bool:
        """Whether a checkpoint was entered with these files."""
        label = self.label_of(checkpoint)
        return label is not None and self._known[label]["files"] == files

    def missing(self, label: str) -> set[str]:
        """The matrices of a checkpoint that have no row yet."""
        return set(self._order) - set(self._rows.get(label, ()))

    def put(self, label: str, rows: Sequence[Row]) -> None:
        """Add the rows that are missing among those given."""
        missing = self.missing(label)
        new: list[Row] = [{"checkpoint": label, **row} for row in rows if row["name"] in missing]
        if self._folder is not None:
            self._writing(lambda: append_rows(self._append_to, new))
        self._rows.setdefault(label, {}).update({row["name"]: row for row in new})

    def forget(self, label: str) -> None:
        """Take out a checkpoint that cannot be measured to the end."""
        self._rows.pop(label, None)
        self._known.pop(label, None)
        if self._folder is not None:
            self._writing(lambda: keep_rows(self._path, lambda row: row.get("checkpoint") != label))

    def series(self) -> Series:
        """Every checkpoint that is whole in the table, in order."""
        done = [label for label in self._known if not self.missing(label)]
        found = []
        for label, checkpoint in self._in_order(done):
            rows = [self._rows[label][name] for name in self._order]
            found.append(
                CheckpointSpectra(
                    label,
                    checkpoint.path,
                    checkpoint.stage,
                    checkpoint.step,
                    rows,
                    self._known[label]["files"],
                )
            )
        return Series(found)

    def settle(self) -> Series:
        """Put the rows on disk in order.

        Returns:
            What :meth:`series` does.
        """
        series = self.series()
        if self._folder is not None and self._share.number == 0:
            whole = {spectra.checkpoint for spectra in series}
            rest = [row for label in self._rows if label not in whole for row in self._rows[label].values()]
            wanted = [*series.rows, *rest]
            if read_rows(self._path) != wanted:
                self._writing(lambda: write_rows(self._path, wanted))
        return series

    def _writing(self, write: Callable[[], T]) -> T:
        try:
            return write()
        except OSError as error:
            assert self._folder is not None
            raise TableError(str(write_error(self._folder, error))) from None


class TableError(CheckpointError):
    """The table cannot be written, of whatever checkpoint."""


def check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse rows that were measured otherwise.

    Raises:
        RunFolderError: a setting differs; the message names it.
    """
    # Which earlier versions did not tell.
    found = {"per_head": False, "full_spectrum": False, "locking": False, **found}
    for name, value in wanted.items():
        if name == "base":  # where it lies; what it is, its files tell
            continue
        if found.get(name) != value:
            if name == "base_files":
                raise RunFolderError(
                    f"{path}: measured against another base, or its files were written anew since "
                    f"({difference(found[name], value)}); choose another folder for out="
                )
            raise RunFolderError(
                f"{path}: measured with {name}={found.get(name)!r}, now {name}={value!r}; choose another folder for out="
            )
