"""The hidden folder in which an output grows, and the moment at which it becomes the output.

.NAME.rlspec-partial/        beside NAME, on the same file system
    checkpoint/              becomes NAME in one rename
    state.json               what is finished; replaced as a whole
    replaced/                NAME as it was, for a moment, where two names cannot be swapped

Several processes may write its shards, see `rlspec.io.launch`.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlspec import _C
from rlspec.errors import CheckpointError
from rlspec.io.files import sync_folder, write_atomically, write_error
from rlspec.io.launch import Launch, are_there, finished_by_others, forget_launch, not_told, staging_folder
from rlspec.io.lock import let_go, take
from rlspec.io.replaced import refuse_mount_point

_VERSION = 1


class Staging:
    """A staging folder, locked against other processes.

    Args:
        out: the folder that is to appear.
        fingerprint: of inputs and settings.
        resume: take over what an interrupted run with the same fingerprint left. Without, what one with another has
            left is removed.
        overwrite: ``out`` may exist and is replaced.

    Raises:
        CheckpointError: ``out`` exists, is a mount point, cannot be made, is being written by another process; or there
            is something to resume and it belongs to other inputs or settings, or resuming was not asked for.
    """

    def __init__(self, out: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        self.out, self.folder = staging_folder(out)
        self.checkpoint = self.folder / "checkpoint"
        self._state = self.folder / "state.json"
        self._replaced = self.folder / "replaced"
        self._overwrite = overwrite
        self._fingerprint = fingerprint
        self._lock = -1
        self._launch: Launch | None = None
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            refuse_mount_point(self.out)
            self._recover()
            if os.path.lexists(self.out) and not overwrite:
                raise CheckpointError(
                    f"{self.out}: exists already; choose another name, or allow overwriting"
                )
            self.folder.mkdir(exist_ok=True)
            self._lock = self._locked()
            if are_there(self.folder):
                raise self._busy()
            self.finished = self._take_over(resume)
            if self.finished:
                self._drop_unfinished()
                self._save()
                forget_launch(self.folder)
            else:
                self._empty()
        except OSError as error:
            self.unlock()
            raise write_error(error.filename or self.out, error) from None
        except BaseException:
            self.unlock()
            raise

    def finish(self, name: str, size: int) -> None:
        """Record that a shard, by its name in the folder, is complete and on the disk."""
        self.finished[name] = size
        self._save()

    def invite(self, count: int, owners: dict[str, int]) -> None:
        """Let the other processes of a launch in, see :class:`rlspec.io.launch.Launch`.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        try:
            self._launch = Launch(self.folder, self._fingerprint, count, owners)
        except OSError as error:
            raise write_error(error.filename or self.folder, error) from None

    def look(self) -> None:
        """Go on only where no other process has failed; errors as :meth:`Launch.look`."""
        if self._launch is not None:
            self._launch.look()

    def wait(self) -> None:
        """Until the other processes' shards are there; errors as :meth:`Launch.wait`."""
        if self._launch is not None:
            self.finished = self._launch.wait(self.finished)
            self._save()

    def publish(self) -> Path:
        """Give the checkpoint its name; whatever had the name before is gone then.

        At every moment either the old or the new folder has the name; where the file system cannot swap two names,
        there is a moment when none has, and the next writer puts the old one back if we die in it.

        Raises:
            CheckpointError: the name was taken meanwhile, or the rename fails.
        """
        here, there = os.fsencode(self.checkpoint), os.fsencode(self.out)
        try:
            if os.path.lexists(self.out):
                if not self._overwrite:
                    raise CheckpointError(
                        f"{self.out}: appeared while its content was written; it is left alone"
                    )
                if not _C.exchange(here, there):
                    os.rename(self.out, self._replaced)
                    os.rename(self.checkpoint, self.out)
            elif not _C.rename_new(here, there):
                os.rename(self.checkpoint, self.out)
            sync_folder(self.out.parent)
        except _C.FileError as error:
            raise CheckpointError(f"{self.out}: {error}") from None
        except OSError as error:
            raise write_error(self.out, error) from None
        try:
            shutil.rmtree(
                self.folder, ignore_errors=True
            )  # the output is complete whether or not this succeeds
        except KeyboardInterrupt:
            shutil.rmtree(self.folder, ignore_errors=True)  # no resumed run would come for what is left
            raise
        self._end_launch(wait=False)
        self.unlock()
        return self.out

    def close(self, *, keep: bool = True) -> None:
        """Stop. What is finished stays for a resumed run; where nothing is, or ``keep`` is false, nothing stays.

        Removed is what this class makes; the folder stays where there is anything else in it, or another process that
        does not end.
        """
        if self._lock >= 0:
            alone = self._end_launch(wait=not (keep and self._finished_by_all()))
            if alone and not (keep and self._finished_by_all()):
                shutil.rmtree(self.checkpoint, ignore_errors=True)
                with suppress(OSError):
                    forget_launch(self.folder)
                    self._state.unlink(missing_ok=True)
                    self.folder.rmdir()
        self.unlock()

    def _finished_by_all(self) -> dict[str, int]:
        """The shards that are finished, those of other processes too."""
        return self.finished if self._launch is None else self.finished | finished_by_others(self.folder)

    def _end_launch(self, *, wait: bool) -> bool:
        """Whether no other process is there."""
        return self._launch is None or self._launch.stop(wait=wait)

    def unlock(self) -> None:
        if self._lock >= 0:
            let_go(self._lock)
        self._lock = -1

    def _locked(self) -> int:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        if take(descriptor) is False:
            os.close(descriptor)
            raise self._busy()
        return descriptor

    def _busy(self) -> CheckpointError:
        if unknown := not_told(self.folder):
            return CheckpointError(
                f"{self.out}: another process may be writing it, and the file system has no locks that would tell; if "
                f"none is, remove {', '.join(path.name for path in unknown)} in {self.folder}"
            )
        return CheckpointError(f"{self.out}: another process is writing it ({self.folder})")

    def _recover(self) -> None:
        """Put the old folder back where a process died between the two renames."""
        if self._replaced.exists() and not os.path.lexists(self.out):
            os.rename(self._replaced, self.out)

    def _take_over(self, resume: bool) -> dict[str, int]:
        """Finished shards and their sizes; none where there is nothing to go on with.

        Raises:
            CheckpointError: it belongs to other inputs or settings; or is of these and would be lost.
        """
        try:
            state: dict[str, Any] = json.loads(self._state.read_bytes())
            inode = self.checkpoint.stat().st_ino
        except (OSError, ValueError):
            return {}
        if state.get("version") != _VERSION or state.get("fingerprint") != self._fingerprint:
            if not resume:
                return {}
            raise CheckpointError(
                f"{self.folder}: belongs to other inputs or settings; repeat those to resume, or start anew without "
                "resuming"
            )
        # Another folder of that name is the one that was replaced: the process died after it had swapped the two.
        if state.get("inode") != inode:
            return {}
        finished: dict[str, int] = state["finished"] | finished_by_others(self.folder)
        left = {name: size for name, size in finished.items() if _size(self.checkpoint / name) == size}
        if left and not resume:
            raise CheckpointError(
                f"{self.folder}: {len(left)} shards of the same inputs and settings are finished there already; give "
                "resume=True to go on with them, or remove that folder to begin anew"
            )
        return left

    def _drop_unfinished(self) -> None:
        """All but finished shards.

        Those that were begun are written anew, and hold room that the disk may not have twice; so are other files, which
        the input may not have any more.
        """
        for root, folders, names in os.walk(self.checkpoint, topdown=False):
            for path in (Path(root, name) for name in names):
                if str(path.relative_to(self.checkpoint)) not in self.finished:
                    path.unlink()
            for folder in (Path(root, name) for name in folders):
                if not any(folder.iterdir()):
                    folder.rmdir()

    def _empty(self) -> None:
        self._state.unlink(missing_ok=True)
        forget_launch(self.folder)
        for folder in (self.checkpoint, self._replaced):
            if folder.exists():
                shutil.rmtree(folder)
        self.checkpoint.mkdir()
        self._save()

    def _save(self) -> None:
        content = {
            "version": _VERSION,
            "fingerprint": self._fingerprint,
            "inode": self.checkpoint.stat().st_ino,
            "finished": self.finished,
        }
        write_file(self._state, json.dumps(content).encode())


def write_file(path: Path, content: bytes) -> None:
    """As :func:`write_atomically`.

    Raises:
        CheckpointError: it cannot be written; names it and says why.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise write_error(path, error) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
