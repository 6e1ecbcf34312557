"""Files that grow side by side under temporary names, few of them open at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rlspec import _C
from rlspec.errors import CheckpointError
from rlspec.io.files import sync_folder, write_error

# How many files that nobody writes to just now may stay open. Each takes up to two descriptors.
_OPEN = 8


@dataclass
class _Output:
    path: Path
    users: int = 0
    handle: _C.OutputFile | None = None
    is_begun: bool = False
    opening: threading.Lock = field(default_factory=threading.Lock)

    @property
    def temporary(self) -> Path:
        return self.path.with_name(f".{self.path.name}.tmp")


class OutputFiles:
    """Files to be written, by the names that they get when they are finished; for several threads.

    However many there are, only those are open that are written to, and the `_OPEN` last ones besides: a checkpoint
    may have more shards than a process may have open files.
    """

    def __init__(self) -> None:
        self._outputs: dict[Path, _Output] = {}  # in the order of their last use
        self._lock = threading.Lock()  # held for moments only

    @contextmanager
    def opened(self, path: Path, size: int | None = None) -> Iterator[_C.OutputFile]:
        """The file, open for as long as the block lasts.

        Args:
            size: of the whole file, to be reserved when it is begun; None: nothing is.

        Raises:
            FileError: it cannot be opened, or reserved.
            CheckpointError: its folder cannot be made; or another file, closed for this one, cannot be written.
        """
        with self._lock:
            output = self._outputs.pop(path, None) or _Output(path)
            self._outputs[path] = output
            output.users += 1
        try:
            with output.opening:
                handle = output.handle or self._open(output, size)
            yield handle
        finally:
            with self._lock:
                output.users -= 1

    def finish(self, path: Path) -> None:
        """On the disk, under its name.

        Raises:
            FileError, OSError: the disk fails.
        """
        with self.opened(path) as file:
            file.finish()
            with self._lock:
                output = self._outputs.pop(path)
        os.replace(output.temporary, path)
        sync_folder(path.parent)

    def close(self) -> None:
        """Let go of every file, finished or not, also where an error in flight still refers to this."""
        with self._lock:
            for output in self._outputs.values():
                output.handle = None

    def _open(self, output: _Output, size: int | None) -> _C.OutputFile:
        self._close_idle()
        name = os.fsencode(output.temporary)
        if output.is_begun:
            handle = _C.OutputFile(name, fresh=False)
        else:
            try:
                output.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(output.path.parent, error) from None
            handle = _C.OutputFile(name)
            if size is not None:
                handle.reserve(size)
        output.handle, output.is_begun = handle, True
        return handle

    def _close_idle(self) -> None:
        """Make room for one more."""
        with self._lock:
            idle = [output for output in self._outputs.values() if output.handle and output.users == 0]
            closing = []
            for output in idle[: max(0, len(idle) + 1 - _OPEN)]:
                closing.append((output.path, output.handle))
                output.handle = None
        for path, handle in closing:
            assert handle is not None
            try:
                handle.sync()
            except _C.FileError as error:
                raise CheckpointError(f"{path}: {error}") from None
