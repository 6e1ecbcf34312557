"""Several processes fill one table: each appends to a file of its own, and the first one takes those in.

::

    spectra.part-2.jsonl     rows of process 2, which holds the file's lock as long as it lives

They need nothing but the folder in common. So a process that dies takes nobody with it, and what it wrote stays.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from rlspec.errors import OptionError, RunFolderError

#: Seconds that processes of one launch may start apart.
APART = 60.0
#: Seconds between two looks at what the others have done.
LOOK = 0.2

_PATTERN = "spectra.part-*.jsonl"


@dataclass(frozen=True)
class Share:
    """Which process this is of those that were started with the same arguments."""

    number: int = 0
    count: int = 1
    local: int = 0  #: its number on this machine, which the choice of its GPU goes by

    @classmethod
    def of_launch(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """As torchrun tells: ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; one process where there are none.

        Raises:
            OptionError: they are no numbers, or out of range.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        given = [environment["RANK"], environment["WORLD_SIZE"], environment.get("LOCAL_RANK", "0")]
        try:
            number, count, local = map(int, given)
        except ValueError:
            number, count, local = -1, 0, 0
        if not (0 <= number < count and local >= 0):
            raise OptionError(f"RANK={given[0]!r} WORLD_SIZE={given[1]!r} LOCAL_RANK={given[2]!r}: no launch")
        return cls(number, count, local)

    def device(self, chosen: torch.device) -> torch.device:
        """The device of this process, where one of no number was chosen for all."""
        if self.count == 1 or chosen.type != "cuda" or chosen.index is not None:
            return chosen
        return torch.device("cuda", self.local % torch.cuda.device_count())


#: One process that does everything.
ALONE = Share()


def take_part(folder: Path, number: int) -> IO[bytes]:
    """Hold the part of a process until the file that is returned is closed.

    Raises:
        RunFolderError: another process of this number goes on holding it.
        OSError: it cannot be written.
    """
    path = folder / f"spectra.part-{number}.jsonl"
    end = time.monotonic() + APART
    while True:
        part = path.open("ab")
        # The first process holds a part for a moment while it takes it in, and removes it.
        if _lock(part) and path.exists() and os.path.samestat(path.stat(), os.fstat(part.fileno())):
            return part
        part.close()
        if time.monotonic() > end:
            raise RunFolderError(f"{path} is in use by another rlspec process")
        time.sleep(LOOK)


def parts(folder: Path) -> dict[int, Path]:
    """The parts in a folder by the number of their process."""
    found = {}
    for path in sorted(folder.glob(_PATTERN)):
        number = path.name.removeprefix("spectra.part-").removesuffix(".jsonl")
        if number.isdecimal():
            found[int(number)] = path
    return found


def ended(folder: Path) -> Iterator[tuple[int, Path | None]]:
    """Each part, None for one that a process still holds. The others are removed once the caller has gone on."""
    for number, path in parts(folder).items():
        with path.open("r+b") as part:
            if not _lock(part):
                yield number, None
                continue
            yield number, path
            path.unlink()


def is_held(lock: Path) -> bool:
    """Whether a living process holds a lock. Opened for writing, which NFS asks of who tries a lock."""
    try:
        with lock.open("r+b") as file:
            return not _lock(file)
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
