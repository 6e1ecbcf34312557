"""The folder of cached decompositions: what lies there, what is in use, and room for more.

::

    3f/3fa9….safetensors    a decomposition, named by its key (see rlspec.spectra.cache); a use sets its time
    users/4711-…            one file per process, locked while the process lives; its time is when the process began

What has not been used for longest goes first. What a running process has used since it began stays, however little
room there is: then nothing new is kept. Only files that carry their own name as their key are ever removed.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rlspec.errors import OptionError

GIB = 2**30
DEFAULT_LIMIT_GIB = 50.0
_KEY = re.compile(r"[0-9a-f]{40}")
_LEFTOVER = re.compile(r"\.[0-9a-f]{40}\.safetensors\.\d+-\d+\.tmp")
_LEFTOVER_SECONDS = 24 * 3600.0  # no file takes that long to write

# Folder -> descriptor of this process's locked file there.
_mine: dict[Path, int] = {}
# Held by the one thread of this process that changes the folder.
changing = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """One decomposition: its file, its size in bytes, and when it was last used (seconds since 1970)."""

    path: Path
    size: int
    used: float


@dataclass(frozen=True)
class Pruned:
    """What pruning removed, and what it would have removed if no running process used it."""

    removed: list[Entry]
    in_use: list[Entry]


def default_cache_dir() -> Path:
    """``$RLSPEC_CACHE``, or ``~/.cache/rlspec``."""
    return Path(os.environ.get("RLSPEC_CACHE") or Path.home() / ".cache" / "rlspec")


def limit_bytes() -> int:
    """The most that the folder may hold: ``$RLSPEC_CACHE_GIB``, or 50 GiB. 0 keeps nothing new.

    Raises:
        OptionError: the variable is no number from 0 on.
    """
    given = os.environ.get("RLSPEC_CACHE_GIB") or str(DEFAULT_LIMIT_GIB)
    try:
        gib = float(given)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise OptionError(f"RLSPEC_CACHE_GIB is {given!r}; wanted a size in GiB, 0 or more")
    return int(gib * GIB)


def entry_path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def entries(folder: Path) -> list[Entry]:
    """Everything in the folder, least recently used first; nothing where there is no such folder."""
    found = []
    for path in _files(folder):
        if path == entry_path(folder, path.stem) and _KEY.fullmatch(path.stem):
            with suppress(FileNotFoundError):  # another process may be pruning
                facts = path.stat(follow_symlinks=False)
                found.append(Entry(path, facts.st_size, facts.st_mtime))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("[0-9a-f][0-9a-f]/*") if path.is_file() and not path.is_symlink())


def begin_use(folder: Path) -> None:
    """From now on, until this process ends, what it uses in the folder is not removed by any process."""
    with changing:
        if folder in _mine:
            return
        users = folder / "users"
        users.mkdir(parents=True, exist_ok=True)
        _in_use_since(folder)  # clears what ended processes left
        while True:
            path = users / f"{os.getpid()}-{secrets.token_hex(4)}"
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:  # else another process cleared it before it was locked
                break
            os.close(descriptor)
        _mine[folder] = descriptor


def mark_used(path: Path) -> None:
    """Note that a file was used now; where it cannot be written, it stays as old as it is."""
    with suppress(OSError):
        os.utime(path)


def prune(folder: Path, limit: int) -> Pruned:
    """Remove least recently used decompositions until at most ``limit`` bytes are left, or only such as are in use.

    Raises:
        OSError: a file cannot be removed.
    """
    found, since = entries(folder), _in_use_since(folder)
    total = sum(entry.size for entry in found)
    removed, in_use = [], []
    for entry in found:
        if total <= limit:
            break
        if entry.used >= since:
            in_use.append(entry)
        elif _is_ours(entry.path):
            entry.path.unlink(missing_ok=True)
            removed.append(entry)
            total -= entry.size
    for path in _files(folder):
        if _LEFTOVER.fullmatch(path.name):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _LEFTOVER_SECONDS:
                    path.unlink()
    return Pruned(removed, in_use)


def make_room(folder: Path, size: int) -> bool:
    """Whether ``size`` bytes more may be kept; what must go for them is gone then, and otherwise nothing is.

    Raises:
        OSError: a file cannot be removed.
    """
    limit = limit_bytes()
    found = entries(folder)
    if sum(entry.size for entry in found) + size <= limit:
        return True
    since = _in_use_since(folder)
    if sum(entry.size for entry in found if entry.used >= since) + size > limit:
        return False
    prune(folder, limit - size)
    return True


def _in_use_since(folder: Path) -> float:
    """When the oldest of the running processes that use the folder began; infinite where there is none."""
    since = math.inf
    for path in (folder / "users").glob("*-*"):
        try:
            began = path.stat().st_mtime
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()  # its process has ended
        except FileNotFoundError:
            continue
        except OSError:  # locked, or not ours to try
            since = min(since, began)
    return since


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="numpy") as file:
            return (file.metadata() or {}).get("key") == path.stem
    except (OSError, SafetensorError):
        return False
