"""Write a checkpoint like another one, with some tensors changed: atomic, resumable, the rest copied in the kernel."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor

from rlspec import _C
from rlspec.errors import CheckpointError, RlspecError
from rlspec.io.companions import companions
from rlspec.io.files import read_error, sync_folder, write_error
from rlspec.io.index import INDEX_FILE, CheckpointIndex
from rlspec.io.launch import JoinedStaging
from rlspec.io.layout import Place, ShardLayout, index_content, lay_out
from rlspec.io.outputs import OutputFiles
from rlspec.io.share import ALONE, Share
from rlspec.io.staging import Staging, write_file

# How much is copied before the copier looks whether it is to stop.
_COPY_BYTES = 1 << 28
_LOG = logging.getLogger(__name__)


class CheckpointWriter:
    """Write the files of ``like`` to a new folder, with the tensors that are put in place of its own.

    Shards, tensor order, metadata and companion files are those of ``like``. A shard of which no tensor changes its
    dtype keeps its header to the byte. Everything grows in a hidden folder beside ``out`` and appears under that
    name in one rename, by `commit`. What is not changed is copied by a thread of its own, without passing through
    Python. Shards that are complete and on the disk are remembered for a resumed run.

    Args:
        out: folder to make.
        like: the checkpoint to follow. Of a single file, opened as such, nothing but the file is reproduced, as
            ``model.safetensors``.
        changed: tensors that will be put, and the dtype each is written in.
        fingerprint: identifies inputs and settings; what an interrupted run left is taken over only if it is equal.
        resume: take it over. Without, it is refused where shards of this fingerprint are finished; what belongs to
            another is thrown away.
        overwrite: replace ``out`` where it exists, at the last moment.
        tokenizer: a folder whose tokenizer and chat templates go before those of ``like``.
        contents: of companion files that are not copied but written anew, by their place in the folder.
        share: which process this is of several that make a writer with the same arguments, each for its shards. All but
            the first wait here until that calls :meth:`invite`.
        owners: the process that writes each of ``like``'s shards; the first one those that are not named.

    Raises:
        CheckpointError: ``out`` exists, is a mount point or cannot be written, or its disk has no room; or, resuming,
            another fingerprint; not resuming, finished shards of this one; or the first process does not come. The same
            for errors while writing: the file, and what is wrong.
    """

    def __init__(
        self,
        out: Path,
        like: CheckpointIndex,
        *,
        changed: Mapping[str, torch.dtype],
        fingerprint: str,
        resume: bool = False,
        overwrite: bool = False,
        tokenizer: Path | None = None,
        contents: Mapping[Path, bytes] = MappingProxyType({}),
        share: Share = ALONE,
        owners: Mapping[Path, int] = MappingProxyType({}),
    ) -> None:
        layouts = lay_out(like, changed)
        self._companions = companions(like, tokenizer)
        self._contents = contents
        self._index = index_content(like, layouts)
        self._share = share
        self._owners = {layout.name: owners.get(layout.source, 0) for layout in layouts}
        self._staging: Staging | JoinedStaging
        if share.number == 0:
            self._staging = Staging(Path(out), fingerprint, resume=resume, overwrite=overwrite)
        else:
            self._staging = JoinedStaging(Path(out), fingerprint, share)
        finished = self._staging.finished
        todo = [layout for layout in layouts if finished.get(layout.name) != layout.size]
        #: changed tensors whose shard is not finished, whoever writes it, when the writer was made
        self.unfinished = frozenset(name for layout in todo for name in layout.changed)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._files = OutputFiles()
        try:
            if share.number == 0:
                self._check_space(todo)
            self._shards = [
                _Shard(layout, self._staging, self._files, self._stop, self._lock)
                for layout in todo
                if self._owners[layout.name] == share.number
            ]
        except BaseException:
            self._staging.close()
            raise
        self._by_name = {name: shard for shard in self._shards for name in shard.layout.changed}
        #: those of them that this process writes, in file order
        self.pending: tuple[str, ...] = tuple(self._by_name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rlspec-copy")
        self._copied: list[Future[None]] = [self._thread.submit(shard.copy) for shard in self._shards]
        self._committed = False

    def invite(self) -> None:
        """Let the other processes begin; nothing in those, or where there are none.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        if self._share.count > 1 and isinstance(self._staging, Staging):
            self._staging.invite(self._share.count, self._owners)

    def look(self) -> None:
        """Go on only as long as the other processes do. To be called before a tensor is put, not after the last one.

        Raises:
            ToldByFirstError, CheckpointError, TensorError: see :class:`rlspec.io.launch.Launch`, ``JoinedStaging``.
        """
        self._staging.look()

    def _check_space(self, todo: list[ShardLayout]) -> None:
        # Shards without changes may be shared with the original's and take no space.
        needed = sum(layout.size for layout in todo if layout.changed)
        needed += sum(path.stat().st_size for path in self._companions.values())
        disk = os.statvfs(self._staging.folder)
        free = disk.f_bavail * disk.f_frsize
        if needed > free:
            raise CheckpointError(
                f"{self._staging.out}: cannot be written: {needed} bytes are needed, the disk has {free} free"
            )

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a changed tensor, in any order, from any thread, once.

        Raises:
            CheckpointError: not the shape or dtype announced, or the disk fails.
            ValueError: not pending, or written already.
        """
        place = self._shard(name).layout.changed[name]
        if tuple(tensor.shape) != place.shape:
            raise CheckpointError(f"{name}: shape {list(tensor.shape)}, {list(place.shape)} was announced")
        self._write(name, place, tensor, 0, place.bytes)

    def put_rows(self, name: str, first_row: int, block: Tensor) -> None:
        """Write rows ``first_row`` ... of a changed tensor, in any order, each once; of a scalar, row 0.

        Args:
            block: (b, ...), rows as of the tensor.

        Raises:
            CheckpointError, ValueError: as `put`.
        """
        place = self._shard(name).layout.changed[name]
        rows = place.shape[0] if place.shape else 1
        count = len(block) if place.shape and block.ndim else 1
        fits = tuple(block.shape[1:]) == place.shape[1:] and 0 <= first_row <= rows - count
        if block.ndim != len(place.shape) or not fits:
            raise CheckpointError(f"{name}: rows {list(block.shape)} at {first_row} of {list(place.shape)}")
        row_bytes = place.bytes // max(rows, 1)
        self._write(name, place, block, first_row * row_bytes, count * row_bytes)

    def _shard(self, name: str) -> _Shard:
        if name not in self._by_name:
            raise ValueError(f"{name!r} is not pending")
        return self._by_name[name]

    def _write(self, name: str, place: Place, tensor: Tensor, start: int, count: int) -> None:
        if tensor.dtype != place.dtype:
            raise CheckpointError(f"{name}: {tensor.dtype}, {place.dtype} was announced")
        self._raise_failed_copies()
        shard = self._shard(name)
        shard.claim(name, start, count)
        if count:
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
            shard.write(place.offset + start, data)
        if shard.wrote(count):
            self._copied.append(self._thread.submit(shard.finish))

    def _raise_failed_copies(self) -> None:
        for future in self._copied:
            if future.done():
                future.result()

    def finish(self) -> None:
        """Wait until all shards are complete and on the disk, so that a resumed run has nothing of them to do.

        Where several processes write, the first one waits for the others' shards too.

        Raises:
            CheckpointError, TensorError: the disk fails, or another process has. What is complete stays for a resumed
                run.
            ValueError: a changed tensor was not put.
        """
        missing = [name for name in self.pending if not self._by_name[name].has(name)]
        if missing:
            raise ValueError(f"{len(missing)} tensors were not put, the first is {missing[0]!r}")
        for future in list(self._copied):
            future.result()
        self._thread.shutdown()
        if not isinstance(self._staging, JoinedStaging):
            self._staging.wait()

    def commit(self) -> Path:
        """Finish all shards, add the other files and the index, and give the folder its name.

        Where several processes write, the first one does all but the others' shards.

        Returns:
            The folder.

        Raises:
            CheckpointError, TensorError, ValueError: as `finish`.
        """
        self.finish()
        if isinstance(self._staging, JoinedStaging):
            self._committed = True
            return self._staging.out
        for place, path in self._companions.items():
            target = self._staging.checkpoint / place
            if place in self._contents:
                write_file(target, self._contents[place])
            else:
                _copy_companion(path, target)
        if self._index is not None:
            write_file(self._staging.checkpoint / INDEX_FILE, self._index)
        try:
            for folder in {(self._staging.checkpoint / place).parent for place in self._companions}:
                sync_folder(folder)
            sync_folder(self._staging.checkpoint)
        except OSError as error:
            raise write_error(self._staging.checkpoint, error) from None
        out = self._staging.publish()
        self._committed = True
        return out

    def close(self, *, keep: bool = True) -> None:
        """Stop. Complete shards stay for a resumed run, unless there are none. May be called twice.

        Args:
            keep: false: nothing stays.
        """
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)
        self._files.close()
        self._staging.close(keep=keep)

    @property
    def resumable(self) -> bool:
        """Whether there is something that a resumed run would take over, or other processes still have to do with."""
        return not self._committed and self._staging.folder.exists()

    def fail(self, error: RlspecError) -> None:
        """Hand what this process stops with to the first one; nothing in that one.

        Raises:
            ToldByFirstError: it will tell.
        """
        if isinstance(self._staging, JoinedStaging):
            self._staging.fail(error)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None and self.resumable:
            _LOG.info("%s: not complete; what is done is kept in %s", self._staging.out, self._staging.folder)


class _Shard:
    """A shard that is being written under a temporary name."""

    def __init__(
        self,
        layout: ShardLayout,
        staging: Staging | JoinedStaging,
        files: OutputFiles,
        stop: threading.Event,
        lock: threading.Lock,
    ) -> None:
        self.layout = layout
        self._staging = staging
        self._files = files
        self._stop = stop
        self._lock = lock  # of the whole writer: held for moments only
        self._path = staging.checkpoint / layout.name
        self._claimed: dict[str, list[tuple[int, int]]] = {}
        self._left = sum(place.bytes for place in layout.changed.values())
        self._untouched = set(layout.changed)
        self._is_copied = False
        self._is_finishing = False

    def copy(self) -> None:
        """All that comes from the original; finishes the shard if nothing else is missing."""
        if self._stop.is_set():
            return
        try:
            with self._opened() as file:
                if not self._copy_to(file):
                    return
        except _C.FileError as error:
            raise self._explained(error) from None
        with self._lock:
            self._is_copied = True
        if self._is_complete():
            self.finish()

    def _copy_to(self, file: _C.OutputFile) -> bool:
        """False: it was stopped."""
        layout = self.layout
        source = os.fsencode(layout.source)
        whole = self._is_whole
        if whole and file.clone(source):
            return True
        if whole:
            file.reserve(layout.size)
        if layout.header is not None:
            file.write(0, layout.header)
        for there, here, count in layout.copies:
            for done in range(0, count, _COPY_BYTES):
                if self._stop.is_set():
                    return False
                file.copy(source, there + done, here + done, min(_COPY_BYTES, count - done))
        return True

    @property
    def _is_whole(self) -> bool:
        """Whether the shard is the original, byte for byte."""
        return not self.layout.changed and self.layout.header is None

    def claim(self, name: str, start: int, count: int) -> None:
        """Remember which bytes of a tensor are written; each may be once."""
        with self._lock:
            ranges = self._claimed.setdefault(name, [])
            written = any(a < start + count and start < b for a, b in ranges)
            if written or (count == 0 and self.layout.changed[name].bytes == 0 and ranges):
                raise ValueError(f"{name!r} was written already")
            ranges.append((start, start + count))
            self._untouched.discard(name)

    def has(self, name: str) -> bool:
        with self._lock:
            ranges = self._claimed.get(name)
            return ranges is not None and sum(b - a for a, b in ranges) == self.layout.changed[name].bytes

    def write(self, offset: int, data: object) -> None:
        try:
            with self._opened() as file:
                file.write(offset, data)  # type: ignore[arg-type]
        except _C.FileError as error:
            raise self._explained(error) from None

    def wrote(self, count: int) -> bool:
        """Take note; True for the call after which nothing is missing."""
        with self._lock:
            self._left -= count
        return self._is_complete()

    def finish(self) -> None:
        """On the disk, under its name, remembered."""
        try:
            self._files.finish(self._path)
            self._staging.finish(self.layout.name, self.layout.size)
        except _C.FileError as error:
            raise self._explained(error) from None
        except OSError as error:
            raise write_error(self._path, error) from None

    def _is_complete(self) -> bool:
        with self._lock:
            complete = self._is_copied and self._left == 0 and not self._untouched and not self._is_finishing
            self._is_finishing |= complete
            return complete

    def _opened(self) -> AbstractContextManager[_C.OutputFile]:
        return self._files.opened(self._path, None if self._is_whole else self.layout.size)

    def _explained(self, error: _C.FileError) -> CheckpointError:
        path = self._path if error.kind == "write_failed" else self.layout.source
        return CheckpointError(f"{path}: {error}")


def _copy_companion(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(target, error) from None
    _copy_file(source, target)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a small file; regular also where the source is a link, with the permissions of a new file."""
    try:
        size = source.stat().st_size
    except OSError as error:
        raise read_error(source, error) from None
    try:
        file = _C.OutputFile(os.fsencode(target))
        file.copy(os.fsencode(source), 0, 0, size)
        file.finish()
    except _C.FileError as error:
        path = target if error.kind == "write_failed" else source
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise write_error(target, error) from None
