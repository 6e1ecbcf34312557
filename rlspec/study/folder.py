"""The folder of a study: study.json, a folder a cell with its result, and the table that comes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlspec.errors import RunFolderError
from rlspec.io.files import read_json_object, write_atomically
from rlspec.jobs.series.checkpoints import Checkpoint, Files, difference
from rlspec.models import EMBEDDED
from rlspec.study.cells import Cell, Study

FORMAT = 1
Row = dict[str, Any]


class StudyFolder:
    """Files of a study. A cell is finished when its result is there, whole."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def cell(self, digest: str) -> Path:
        return self.path / "cells" / digest

    def checkpoint(self, digest: str, step: int) -> Path:
        return self.cell(digest) / f"checkpoint-{step}"

    def finished(self, digest: str) -> bool:
        return (self.cell(digest) / "result.json").is_file()

    def result(self, digest: str) -> Row:
        """The result of a finished cell.

        Raises:
            RunFolderError: it cannot be read.
        """
        return read_json_object(self.cell(digest) / "result.json", RunFolderError)

    def seconds(self, digest: str) -> float | None:
        """What a cell took; None where that is not known."""
        path = self.cell(digest) / "seconds.json"
        return float(read_json_object(path, RunFolderError)["seconds"]) if path.is_file() else None

    def finish(self, digest: str, result: Row, seconds: float) -> None:
        """Write a cell's files, the one that makes it finished last."""
        write_atomically(self.cell(digest) / "seconds.json", _json({"seconds": seconds}))
        write_atomically(self.cell(digest) / "result.json", _json(result))

    def check(self, study: Study) -> None:
        """Refuse a folder that holds anything but a part of this study. Writes nothing.

        Raises:
            RunFolderError: it holds something else, a study with cells that this one does not have, or one whose model
                was written anew.
        """
        if (self.path / "study.json").is_file():
            stored = self.study()
            if stored.threads != study.threads:
                raise RunFolderError(
                    f"{self.path}: was begun with threads={stored.threads}, cannot go on with threads={study.threads}"
                )
            if stored.plan != study.plan or not _digests(stored) <= _digests(study):
                raise RunFolderError(
                    f"{self.path}: holds a study of plan {stored.plan!r} with other settings; give the same ones to go "
                    "on (more seeds may be added), or another folder"
                )
            before = read_json_object(self.path / "study.json", RunFolderError).get("model_files", {})
            now = _model_files(study)
            if now and (told := difference(before, now)):
                raise RunFolderError(
                    f"{self.path}: its model was written anew since the study was begun ({told}); choose another folder"
                )
        elif self.path.is_dir():
            if any(entry.name != ".lock" for entry in self.path.iterdir()):
                raise RunFolderError(f"{self.path}: exists and is no study; choose another folder")
        elif self.path.exists():
            raise RunFolderError(f"{self.path}: is no folder")

    def begin(self, study: Study) -> None:
        """Write study.json."""
        (self.path / "cells").mkdir(parents=True, exist_ok=True)
        cells = [cell.to_json() for cell in study.cells]
        content = {"format": FORMAT, "plan": study.plan, "threads": study.threads}
        content |= {"model_files": _model_files(study), "cells": cells}
        write_atomically(self.path / "study.json", _json(content))

    def study(self) -> Study:
        """The study as study.json has it.

        Raises:
            RunFolderError: it is missing, damaged or of another format.
        """
        path = self.path / "study.json"
        content = read_json_object(path, RunFolderError)
        if content.get("format") != FORMAT:
            raise RunFolderError(
                f"{path}: format {content.get('format')!r}; this version reads format {FORMAT}"
            )
        try:
            cells = [Cell.from_json(cell) for cell in content["cells"]]
            return Study(content["plan"], cells, content["threads"])
        except (KeyError, TypeError) as error:
            raise RunFolderError(f"{path}: not the cells of a study ({error!r})") from None


def _model_files(study: Study) -> Files:
    """What tells whether the model was written anew: its weights' files; none of the one that comes with rlspec, and
    of one that is gone, which finished cells do not need."""
    names = {str(cell.settings.get("model", EMBEDDED)) for cell in study.cells} - {EMBEDDED}
    folder = Path(next(iter(names), ""))
    return Checkpoint.at(folder).files() if names and folder.is_dir() else {}


def _digests(study: Study) -> set[str]:
    return {cell.digest for cell in study.cells}


def _json(content: Row) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
