"""One training at a time writes to a tracking folder, and a resumed one knows whether the folder is its own."""

from __future__ import annotations

import os
import uuid
import weakref
from pathlib import Path
from typing import IO, Any

from rlspec.errors import RunFolderError
from rlspec.io.lock import let_go, take_lock

#: by folder: who holds it in this process
_HOLDS: weakref.WeakValueDictionary[Path, Hold] = weakref.WeakValueDictionary()
# Where the trainer's own checkpoints keep it. No callback's class has this name, so that none is made from it.
_KEPT = "rlspec's trainings"


class Hold:
    """The lock of a folder, made where it is missing, until :meth:`release`.

    In one process whoever comes last takes it over: a training that was interrupted, in a notebook say, never ends.

    Raises:
        RunFolderError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        earlier = _HOLDS.get(self.folder)
        if earlier is not None:
            earlier.release()
        try:
            self._lock: IO[bytes] | None = take_lock(self.folder)
        except RunFolderError:
            raise RunFolderError(
                f"{folder} is in use by another training, whose rows would mix with this one's; choose another out="
            ) from None
        self._process = os.getpid()
        _HOLDS[self.folder] = self

    def check(self) -> None:
        """Raise RunFolderError where another training of this process has taken the folder over."""
        if self._lock is None:
            raise RunFolderError(f"{self.folder} is in use by a later training of this process")

    def release(self) -> None:
        if self._lock is not None:
            if self._process == os.getpid():
                let_go(self._lock)
            else:  # a fork: the lock is that of the process that it comes from
                self._lock.close()
        self._lock = None


def new_training() -> str:
    """A name that no other training has."""
    return uuid.uuid4().hex


def trainings_of(state: Any) -> list[str] | None:
    """The trainings that a trainer's state, or the checkpoint that it comes from, belongs to: one for each callback.

    Returns:
        None where the state cannot tell.
    """
    kept = getattr(state, "stateful_callbacks", None)
    if not isinstance(kept, dict):
        return None
    found = kept.get(_KEPT, {})
    return list(found.get("trainings", ())) if isinstance(found, dict) else []


def belongs_to(state: Any, training: str) -> None:
    """Have a trainer's state, and the checkpoints that it will save, belong to a training."""
    known = trainings_of(state)
    if known is not None and training not in known:
        state.stateful_callbacks[_KEPT] = {"args": {}, "attributes": {}, "trainings": [*known, training]}
