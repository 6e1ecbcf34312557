"""Rows as JSON lines: one reader for the run, its report and a restoration's journal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from report_toys import make_run

from rlspec.errors import CheckpointError, RlspecError, RunFolderError
from rlspec.io.jsonl import append_rows, read_rows
from rlspec.report.data import read_run
from rlspec.restore.report import Journal, MatrixReport
from rlspec.run.folder import RunFolder

ROW = MatrixReport("n", "n", "q", 0, 4, 3, "float32", 2, 0.1, 0.2, 1e-9, 0.5, 12, None, "exact", "né")


def journal_of(out: Path) -> Path:
    """The file of the only process, or the first."""
    return out.parent / f".{out.name}.rlspec-restored.jsonl"


def reports(count: int) -> list[MatrixReport]:
    return [MatrixReport(**asdict(ROW) | {"name": f"{i}"}) for i in range(count)]


@pytest.mark.parametrize("line", [b"{oops", b"[1]", b'{"a": "\xff"}', b"[" * 9000, b"1" * 9000])
@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda path: RunFolder(path.parent).metrics(), RunFolderError),
        (lambda path: read_run(path.parent), RunFolderError),
        (lambda path: Journal(path.rename(journal_of(path)).with_name(path.name)).read(), CheckpointError),
    ],
    ids=["run", "report", "journal"],
)
def test_every_reader_tells_of_a_damaged_line_alike(
    read: Callable[[Path], Any], kind: type[RlspecError], line: bytes, tmp_path: Path
) -> None:
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\n" + line + b"\n" + b"".join(rest))
    with pytest.raises(kind) as error:
        read(path)
    assert type(error.value) is kind and "\n" not in str(error.value)
    where = path if path.exists() else journal_of(path)
    assert str(error.value).startswith(f"{where}, line 3: ")  # the empty line counts and does no harm


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read_rows(tmp_path)
    journal_of(tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"{journal_of(tmp_path / 'out')}: "):
        Journal(tmp_path / "out").read()


def test_a_journal_cut_at_any_byte_goes_on_with_the_whole_rows(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = journal_of(out)
    *done, new = reports(3)
    Journal(out).append(done)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = done[: data[:length].count(b"\n")]
        assert Journal(out).read() == {row.name: row for row in whole}
        Journal(out).append([new])
        assert list(Journal(out).read().values()) == [*whole, new]


def test_going_on_behind_a_cut_line_unread_would_be_noticed(tmp_path: Path) -> None:
    """The broken twin: reading is what removes the cut line."""
    out = tmp_path / "out"
    path = journal_of(out)
    path.write_bytes(b'{"na')
    Journal(out).append(reports(1))
    with pytest.raises(CheckpointError, match="line 1: not JSON"):
        Journal(out).read()


def test_a_row_of_another_version_is_left_out_and_the_latest_counts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = journal_of(out)
    append_rows(path, [{"name": "old", "layers": 3}, asdict(ROW) | {"k": 1}, asdict(ROW)])
    assert Journal(out).read() == {"n": ROW}
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["old", "n", "n"]


def test_rows_for_which_the_disk_has_no_room_leave_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that takes a part of what is written."""
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"name": "first"}])
    before = path.read_bytes()
    text = (
        "import resource, sys\nfrom pathlib import Path\nfrom rlspec.io.jsonl import append_rows\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 9}, resource.RLIM_INFINITY))\n"
        f"try:\n    append_rows(Path({str(path)!r}), [{{'name': 'x' * 99}}])\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n" and path.read_bytes() == before
    append_rows(path, [{"name": "second"}])
    assert [row["name"] for row in read_rows(path)] == ["first", "second"]
