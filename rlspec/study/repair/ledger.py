"""What a search has scored so far, a line of JSON each: a search that was killed goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlspec.errors import CheckpointError, OptionError
from rlspec.io.files import write_error
from rlspec.io.jsonl import append_rows, read_rows, repair
from rlspec.io.lock import let_go, take_lock
from rlspec.study.repair.scores import Costs, as_row, from_row


class Ledger:
    """The scores of a search, in ``folder/ledger.jsonl``, found again by what was scored.

    Raises:
        OptionError: the file is another search's.
        CheckpointError: it cannot be read or written.
        RunFolderError: another process searches there.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._path = folder / "ledger.jsonl"
        self._rows: list[tuple[dict[str, Any], Costs]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(folder)
            repair(self._path)
        except OSError as error:
            raise write_error(folder, error) from None
        rows = read_rows(self._path, CheckpointError)
        if not rows:
            self._append({"search": identity})
            return
        if rows[0].get("search") != identity:
            raise OptionError(
                f"{self._path} is of a search of other models or data; give out= another folder"
            )
        self._rows = [(row["of"], from_row(row["score"])) for row in rows[1:]]
        self.resumed = len(self._rows)

    resumed = 0

    def close(self) -> None:
        """Let other processes search there."""
        let_go(self._lock)

    def score(self, of: dict[str, Any], compute: Callable[[], Costs]) -> Costs:
        """The score noted, or the one computed now, noted before it is returned."""
        for known, score in self._rows:
            if known == of:
                return score
        score = compute()
        self._append({"of": of, "score": as_row(score)})
        self._rows.append((of, score))
        return score

    def knows(self, of: dict[str, Any]) -> bool:
        return any(known == of for known, _ in self._rows)

    def _append(self, row: dict[str, Any]) -> None:
        try:
            append_rows(self._path, [row])
        except OSError as error:
            raise write_error(self._path, error) from None
