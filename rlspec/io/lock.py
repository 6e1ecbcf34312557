"""Locks of files, each held until :func:`let_go`, or until the process that has it open ends.

A lock belongs to what was opened, not to who opened it: a child that was forked meanwhile, such as a worker of a
DataLoader, has it open too, and closing the file here would leave the lock with the child. Locks need nothing but a file
system in common. Some have none, as Lustre without its option for them.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from rlspec.errors import RunFolderError


def take(file: IO[bytes] | int, *, shared: bool = False) -> bool | None:
    """Lock an open file, or what a descriptor has open.

    Returns:
        False where another process holds it, None where the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK) else False
    return True


def let_go(file: IO[bytes] | int) -> None:
    """Close an open file, or a descriptor, and have nobody hold its lock."""
    with suppress(OSError):  # where there are no locks
        fcntl.flock(file, fcntl.LOCK_UN)
    if isinstance(file, int):
        os.close(file)
    else:
        file.close()


def is_held(lock: Path) -> bool:
    """Whether a living process holds a lock; false where there is no such file, and true where that cannot be told.

    Those that look do not take each other for one: their locks are shared. The file is opened for writing, which NFS
    asks of who tries a lock.
    """
    try:
        with lock.open("r+b") as file:
            return not take(file, shared=True)
    except FileNotFoundError:
        return False


def is_told(lock: Path) -> bool:
    """Whether :func:`is_held` tells of an existing file; false where its file system has no locks."""
    with lock.open("r+b") as file:
        return take(file, shared=True) is not None


def locked(path: Path, content: bytes) -> IO[bytes]:
    """Give a new file its name once it has its content and is locked, until :func:`let_go` of what is returned.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    file = temporary.open("xb")
    try:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        take(file)
        os.replace(temporary, path)
    except BaseException:
        file.close()
        raise
    return file


def take_lock(folder: Path, *, on_wait: Callable[[], None] | None = None) -> IO[bytes]:
    """Hold the lock of a folder, where one process at a time writes, until :func:`let_go` of what is returned.

    Where the file system has no locks, nothing is held.

    Args:
        on_wait: wait for a process that holds it, and call this before.

    Raises:
        RunFolderError: another process holds it, and ``on_wait`` is None.
    """
    lock = (folder / ".lock").open("ab")
    if take(lock) is not False:
        return lock
    if on_wait is None:
        lock.close()
        raise RunFolderError(f"{folder} is in use by another rlspec process")
    on_wait()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock
