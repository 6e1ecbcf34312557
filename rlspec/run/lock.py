"""One process at a time writes to a folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rlspec.errors import RunFolderError


def take_lock(folder: Path, *, on_wait: Callable[[], None] | None = None) -> IO[bytes]:
    """Hold the lock of a folder until the file that is returned is closed.

    Where the file system has no locks, as Lustre without its option for them, nothing is held.

    Args:
        on_wait: wait for a process that holds it, and call this before.

    Raises:
        RunFolderError: another process holds it, and ``on_wait`` is None.
    """
    lock = (folder / ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            return lock
        if on_wait is not None:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
            return lock
        lock.close()
        raise RunFolderError(f"{folder} is in use by another rlspec process") from None
    return lock
