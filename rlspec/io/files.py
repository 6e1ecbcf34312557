"""Small files: written whole or not at all, and JSON that is read with one clear error."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlspec.errors import CheckpointError, RlspecError

# How the names of the files end, beside the weights, that loaders of a model read.
_LOADED = (".json", ".jinja", ".model", ".txt")


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside ``path``. What the block leaves there takes the name at once, when it ends.

    Readers see the old file or the new one; a kill leaves the old one. The file is on the disk afterwards, with the
    permissions that `open` gives a new one, whatever the library that wrote it does.

    Args:
        shared: several processes may be writing this file.

    Raises:
        OSError: it cannot be written.
    """
    mine = f".{os.getpid()}-{threading.get_ident()}" if shared else ""
    temporary = path.with_name(f".{path.name}{mine}.tmp")
    # A leftover of a kill, or a link in a folder that came from elsewhere: what it points to must not be written.
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def give_usual_modes(folder: Path) -> None:
    """Give all files below a folder the permissions that `open` gives new ones there.

    safetensors writes files that their owner alone may read.

    Raises:
        OSError: they cannot be given.
    """
    probe = folder / f".{os.getpid()}-{threading.get_ident()}.mode"
    probe.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def write_atomically(path: Path, content: bytes) -> None:
    """The same for a file whose content is at hand."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sync_folder(folder: Path) -> None:
    """What was created in or renamed into the folder is on the disk when this returns, if it may be read.

    Raises:
        OSError: the disk fails.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system has nothing to sync
            raise
    finally:
        os.close(descriptor)


def told_apart(paths: Iterable[Path], known: Iterable[Path] = (), taken: Collection[str] = ()) -> list[str]:
    """The end of each path that tells it from the others, and from those known before.

    Links are kept: a link's own name is what whoever made it calls the thing.

    Args:
        paths: made absolute.
        known: absolute.
        taken: ends that are not given to any.
    """
    places = [Path(os.path.abspath(path)) for path in paths]
    every = {*known, *places}
    found = []
    for path in places:
        parts = path.parts
        others = [place.parts for place in every if place.parts != parts]
        length = 1
        while length < len(parts) and (
            os.path.join(*parts[-length:]) in taken
            or any(other[-length:] == parts[-length:] for other in others)
        ):
            length += 1
        found.append(os.path.join(*parts[-length:]))
    return found


def read_error(path: str | Path, error: OSError, kind: type[RlspecError] = CheckpointError) -> RlspecError:
    return kind(f"{path}: cannot be read: {error.strerror or error}")


def write_error(path: str | Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written: {error.strerror or error}")


def refuse_lfs_pointers(files: Iterable[Path], kind: type[RlspecError] = CheckpointError) -> None:
    """Refuse files in whose place a clone without Git LFS has a pointer; those that no loader reads may be pointers.

    Raises:
        RlspecError: of that ``kind``: one is a pointer, or cannot be read.
    """
    # Imported here: commands that need no compiled extension write files too, and say so where it is missing.
    from rlspec import _C

    for path in files:
        if path.suffix not in _LOADED:
            continue
        try:
            with path.open("rb") as file:
                _C.refuse_lfs_pointer(file.read(64))
        except OSError as error:
            raise read_error(path, error, kind) from None
        except _C.FileError as error:
            raise kind(f"{path}: {error}") from None


def read_json_object(path: Path, kind: type[RlspecError] = CheckpointError) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        RlspecError: of that ``kind``: it cannot be read, is a pointer of Git LFS, or holds something else.
    """
    refuse_lfs_pointers([path], kind)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise read_error(path, error, kind) from None
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise kind(f"{path}: expected a JSON object")
    return content
