"""One process at a time writes to a folder."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from rlspec.errors import RunFolderError


def take_lock(folder: Path) -> IO[bytes]:
    """Hold the lock of a folder until the file that is returned is closed.

    Raises:
        RunFolderError: another process holds it.
    """
    lock = (folder / ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunFolderError(f"{folder} is in use by another rlspec process") from None
    return lock
