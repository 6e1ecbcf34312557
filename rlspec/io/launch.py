"""Several processes write the shards of one output, into one staging folder.

.NAME.rlspec-partial/        see `rlspec.io.staging`
    launch                   who the first process waits for; it holds the file's lock as long as it goes on
    process-2.jsonl          what process 2 has finished, or why it stopped; it holds this lock as long as it lives

The first process makes the folder, and the others enter it once the launch is there. Each writes shards of its own. A
file of either kind is made, locked and then given its name: one whose lock nobody holds is a dead process's, for good.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from rlspec.errors import CheckpointError, RlspecError, RunFolderError, TensorError
from rlspec.io.files import write_error
from rlspec.io.jsonl import append_rows, read_rows
from rlspec.io.lock import is_held, is_told, let_go, locked, take
from rlspec.io.share import APART, LOOK, Share

_NAME = "launch"


class ToldByFirstError(CheckpointError):
    """Another process is at fault, or all are alike: the first one says so."""


class FirstMissingError(CheckpointError, RunFolderError):
    """The first process has not come."""


class ChangedInputsError(CheckpointError):
    """An input is not what it was when the work began: nothing that was made of it can be used."""


# What a process can fail with that means something to the first one, beyond the message.
_KINDS: dict[str, type[RlspecError]] = {kind.__name__: kind for kind in (TensorError, ChangedInputsError)}


def staging_folder(out: Path) -> tuple[Path, Path]:
    """The output's path, links followed, and the folder that it grows in."""
    out = out.resolve() if out.is_symlink() else Path(os.path.abspath(out))
    return out, out.parent / f".{out.name}.rlspec-partial"


def launch_file(out: Path) -> Path:
    """What the first of the processes that write an output holds as long as it goes on."""
    return staging_folder(out)[1] / _NAME


def wait_for_launch(launch: Path, began: float) -> bool:
    """Wait until the first process is there and lets others in; False: it is not within the time.

    Args:
        launch: the file that it holds then.
        began: ``time.monotonic()`` when this process did.
    """
    while not is_held(launch):
        if time.monotonic() - began > APART:
            return False
        time.sleep(LOOK)
    return True


def are_there(folder: Path) -> bool:
    """Whether processes of a launch still write into a staging folder."""
    return any(is_held(path) for path in (folder / _NAME, *_parts(folder).values()))


def not_told(folder: Path) -> list[Path]:
    """The files for whose sake :func:`are_there` says so though it cannot know: their file system has no locks."""
    return [
        path for path in (folder / _NAME, *_parts(folder).values()) if path.exists() and not is_told(path)
    ]


def finished_by_others(folder: Path) -> dict[str, int]:
    """Shards that processes other than the first have finished, and their sizes."""
    rows = [row for path in _parts(folder).values() for row in read_rows(path, CheckpointError)]
    return {row["finished"]: row["size"] for row in rows if "finished" in row}


def forget_launch(folder: Path) -> None:
    """Remove what the processes of an ended launch left, beside the shards."""
    for path in (folder / _NAME, *_parts(folder).values()):
        path.unlink(missing_ok=True)


class Launch:
    """The other processes, as the first one sees them.

    Args:
        folder: the staging folder, ready for them.
        fingerprint: of inputs and settings, which must be theirs too.
        count: of processes, this one with them.
        owners: which of them writes each shard.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, fingerprint: str, count: int, owners: dict[str, int]) -> None:
        self._folder = folder
        self._count = count
        self._owners = owners
        self._token = uuid4().hex
        self._began = time.monotonic()
        about = {"token": self._token, "fingerprint": fingerprint, "count": count}
        self._lock: IO[bytes] | None = locked(folder / _NAME, json.dumps(about).encode())

    def look(self) -> None:
        """Go on only where no process has failed.

        Raises:
            TensorError: one has found NaN or infinity.
            ChangedInputsError: one has found other inputs than there were.
            CheckpointError: one has failed otherwise.
        """
        for number, path in _parts(self._folder).items():
            for row in read_rows(path, CheckpointError):
                if "failure" not in row:
                    continue
                if row["kind"] in _KINDS:
                    raise _KINDS[row["kind"]](row["failure"])
                raise CheckpointError(f"process {number} of {self._count}: {row['failure']}")

    def wait(self, finished: dict[str, int]) -> dict[str, int]:
        """Until all shards of the others are there, and those that have some to write have come for them.

        Returns:
            All shards and their sizes, those given with them.

        Raises:
            TensorError, CheckpointError: as :meth:`look`; or a process has ended before it was done, and those that live
                have finished theirs.
        """
        others = {number for number in self._owners.values() if number}
        while True:
            late = time.monotonic() - self._began > APART
            parts = {number: self._folder / f"process-{number}.jsonl" for number in others}
            alive = {
                number for number, path in parts.items() if is_held(path)
            }  # before what they wrote is read
            self.look()
            come = {number for number, path in parts.items() if path.exists()}
            finished = finished | finished_by_others(self._folder)
            lacking: dict[int, int] = {}
            for name, number in self._owners.items():
                if number and name not in finished:
                    lacking[number] = lacking.get(number, 0) + 1
            if not lacking and (late or come == others):
                return finished
            if lacking and all(number not in alive and (late or number in come) for number in lacking):
                told = ", ".join(
                    f"process {number} ({left} shards)" for number, left in sorted(lacking.items())
                )
                raise CheckpointError(
                    f"of {self._count} processes these have ended before their shards were written: {told}"
                )
            time.sleep(LOOK)

    def stop(self, *, wait: bool) -> bool:
        """Let the others end, each before its next tensor.

        Args:
            wait: until they have.

        Returns:
            Whether none of them is there any more.
        """
        with suppress(OSError):
            (self._folder / _NAME).unlink(missing_ok=True)
        if self._lock is not None:
            let_go(self._lock)
            self._lock = None
        began = time.monotonic()
        while wait and are_there(self._folder) and time.monotonic() - began < APART:
            time.sleep(LOOK)
        return not are_there(self._folder)


class JoinedStaging:
    """The staging folder of the first process, as another one has it. See :class:`rlspec.io.staging.Staging`.

    Args:
        out, fingerprint: as there.
        share: which process this is.

    Raises:
        FirstMissingError: the first process does not come.
        ToldByFirstError: it has stopped meanwhile.
        CheckpointError: it does something else, or this one cannot write there.
    """

    def __init__(self, out: Path, fingerprint: str, share: Share) -> None:
        self.out, self.folder = staging_folder(out)
        self.checkpoint = self.folder / "checkpoint"
        self._share = share
        self._path = self.folder / f"process-{share.number}.jsonl"
        if not wait_for_launch(self.folder / _NAME, time.monotonic()):
            raise FirstMissingError(
                f"{self.out}: process 0 of {share.count} has not begun to write it in {APART:.0f} s; do all see one "
                "file system?"
            )
        try:
            self._launch = (self.folder / _NAME).stat().st_ino
            about: dict[str, Any] = json.loads((self.folder / _NAME).read_bytes())
            if (about["fingerprint"], about["count"]) != (fingerprint, share.count):
                raise CheckpointError(
                    f"{self.out}: process 0 has other inputs or settings than process {share.number} of {share.count}; "
                    "give all the same command"
                )
            state = json.loads((self.folder / "state.json").read_bytes())
            self.finished: dict[str, int] = state["finished"] | finished_by_others(self.folder)
            if is_held(self._path):
                raise CheckpointError(
                    f"{self.out}: another process {share.number} is writing it ({self._path})"
                )
            # What a process of this number has finished before it in the same launch stays so.
            before = self._path.read_bytes() if self._path.exists() else b""
            self._lock: IO[bytes] | None = locked(self._path, before[: before.rfind(b"\n") + 1])
        except OSError as error:
            if not (self.folder / _NAME).exists():
                raise self._stopped() from None
            raise write_error(error.filename or self.folder, error) from None

    def finish(self, name: str, size: int) -> None:
        """Record that a shard, by its name in the folder, is complete and on the disk."""
        self.finished[name] = size
        append_rows(self._path, [{"finished": name, "size": size}])

    def look(self) -> None:
        """Go on only as long as the first process does.

        Raises:
            ToldByFirstError: it has stopped.
            CheckpointError: it was killed.
        """
        launch = self.folder / _NAME
        try:
            same = launch.stat().st_ino == self._launch
        except FileNotFoundError:
            same = False
        if not same:
            raise self._stopped()
        if not is_held(launch):
            raise CheckpointError(
                f"{self.out}: process 0 of {self._share.count} has ended before process {self._share.number} was done"
            )

    def fail(self, error: RlspecError) -> None:
        """Let the first process tell what this one stops with, if it lives.

        Raises:
            ToldByFirstError: it will, or has stopped itself.
        """
        try:
            self.look()
        except ToldByFirstError:
            raise
        except CheckpointError:
            return
        with suppress(OSError):
            append_rows(self._path, [{"failure": str(error), "kind": type(error).__name__}])
            raise ToldByFirstError(str(error)) from error

    def close(self, *, keep: bool = True) -> None:
        """Stop. What is finished is the first process's to keep or to remove; where it has gone and kept nothing, before
        it could know of this one, nothing stays."""
        if self._lock is not None:
            let_go(self._lock)
            self._lock = None
        with suppress(OSError):
            if not (self.folder / "state.json").exists():
                folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if take(folder) is not False:  # nobody begins anew there
                        self._path.unlink(missing_ok=True)
                        self.folder.rmdir()
                finally:
                    let_go(folder)

    def _stopped(self) -> ToldByFirstError:
        return ToldByFirstError(f"{self.out}: process 0 of {self._share.count} has stopped")


def _parts(folder: Path) -> dict[int, Path]:
    """What the other processes write, by their numbers."""
    found = {}
    for path in folder.glob("process-*.jsonl"):
        number = path.name.removeprefix("process-").removesuffix(".jsonl")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))
