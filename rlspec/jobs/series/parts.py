"""Several processes fill one table: each appends to a file of its own, and the first one takes those in.

::

    .launch                  the first process holds its lock while the others may come and measure
    spectra.part-2.jsonl     rows of process 2, which holds the file's lock as long as it lives
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rlspec.errors import RunFolderError
from rlspec.io.lock import take
from rlspec.io.share import APART, LOOK

_PATTERN = "spectra.part-*.jsonl"


def launch_file(folder: Path) -> Path:
    """What the first of several processes holds from when on it refuses nothing any more."""
    return folder / ".launch"


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
        if take(part) and path.exists() and os.path.samestat(path.stat(), os.fstat(part.fileno())):
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
            if not take(part):
                yield number, None
                continue
            yield number, path
            path.unlink()
