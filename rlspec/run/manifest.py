"""What a run wrote into its folder, and how that looked: so it removes its own work and nothing else.

``written.jsonl`` has one row for each checkpoint, array file and event file, put there before the thing gets its
name. A later row for the same path counts.
"""

from __future__ import annotations

import os
from pathlib import Path

from rlspec.io.jsonl import append_rows, keep_rows, read_rows, repair

# File within the thing ("" where it is a file itself) -> size in bytes, time of modification in whole seconds:
# not every file system keeps more. None for a file that grows while the run goes on.
Files = dict[str, tuple[int, int]] | None


class Manifest:
    """The things that the run in ``root`` wrote. Paths lie below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.path = root / "written.jsonl"

    def repair(self) -> None:
        """Remove a cut-off last line."""
        repair(self.path)

    def record(self, path: Path, content: Path | None = None) -> None:
        """Note that ``path`` is the run's own.

        Args:
            content: the file or folder that is about to be renamed to it; None for a file that will grow.
        """
        row = {"path": self._relative(path), "files": None if content is None else _files(content)}
        append_rows(self.path, [row])

    def paths(self, *below: Path) -> list[Path]:
        """What was written in one of these folders, whether or not it is still there."""
        return [path for path in map(self._root.joinpath, self._rows()) if set(below) & set(path.parents)]

    def __contains__(self, path: Path) -> bool:
        return self._relative(path) in self._rows()

    def changed(self, path: Path) -> str:
        """What is at a recorded path that the run did not put there, in words; "" if nothing is."""
        files = self._rows()[self._relative(path)]
        if not os.path.lexists(path):
            return ""
        if path.is_symlink():
            return "it is a link now"
        if files is None or "" in files:
            same = path.is_file() and (files is None or _stamp(path) == files[""])
            return "" if same else "it was changed after this run wrote it"
        if not path.is_dir():
            return "it was a folder when this run wrote it"
        for entry in sorted(path.rglob("*")):
            name = entry.relative_to(path).as_posix()
            if entry.is_dir() and not entry.is_symlink():
                continue
            if name not in files:
                return f"it holds {name}, which this run did not write"
            if entry.is_symlink() or _stamp(entry) != files[name]:
                return f"its {name} was changed after this run wrote it"
        return ""

    def remove(self, path: Path) -> None:
        """Delete what was recorded for ``path``, file by file; a folder stays if it holds anything else."""
        files = self._rows()[self._relative(path)]
        if files is None or "" in files:
            path.unlink(missing_ok=True)
        elif path.is_dir():
            for name in files:
                (path / name).unlink(missing_ok=True)
            for folder in [*sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True), path]:
                if not any(folder.iterdir()):
                    folder.rmdir()
        keep_rows(self.path, lambda row: row["path"] != self._relative(path))

    def _rows(self) -> dict[str, Files]:
        found: dict[str, Files] = {}
        for row in read_rows(self.path):
            files = row["files"]
            found[row["path"]] = files and {name: (size, time) for name, (size, time) in files.items()}
        return found

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _files(content: Path) -> Files:
    if content.is_file():
        return {"": _stamp(content)}
    return {
        path.relative_to(content).as_posix(): _stamp(path) for path in content.rglob("*") if path.is_file()
    }


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, int(status.st_mtime)
