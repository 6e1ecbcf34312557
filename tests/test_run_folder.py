"""The run folder's files: whole rows only, no duplicates, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlspec.errors import RunFolderError
from rlspec.run.folder import RunFolder
from rlspec.run.jsonl import append_rows, keep_rows, read_rows, repair


def test_rows_come_back_and_nan_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"step": 1, "loss": 0.1 + 0.2, "name": "rotação"}])
    append_rows(path, [{"step": 2, "loss": float("nan"), "sub": {"x": [float("inf"), 1]}}])
    assert read_rows(path) == [
        {"step": 1, "loss": 0.1 + 0.2, "name": "rotação"},
        {"step": 2, "loss": None, "sub": {"x": [None, 1]}},
    ]


def test_cut_at_any_byte_leaves_the_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"step": step, "text": "é" * step} for step in range(3)]
    append_rows(path, rows)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        assert read_rows(path) == rows[:whole]
        repair(path)
        append_rows(path, [{"step": "new"}])
        assert read_rows(path) == [*rows[:whole], {"step": "new"}]


def test_appending_to_a_cut_line_without_repair_would_be_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    append_rows(path, [{"step": 2}])
    with pytest.raises(RunFolderError, match="line 2: not JSON"):
        read_rows(path)


def test_keep_rows_leaves_an_unchanged_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"step": 1}, {"step": 2}])
    inode = path.stat().st_ino
    assert keep_rows(path, lambda row: True) == 0
    assert path.stat().st_ino == inode
    assert keep_rows(path, lambda row: row["step"] > 1) == 1
    assert read_rows(path) == [{"step": 2}]


@pytest.mark.parametrize("content", [None, "config.yaml", "other.txt"])
def test_create_refuses_what_exists_and_leaves_it(tmp_path: Path, content: str | None) -> None:
    out = tmp_path / "run"
    out.mkdir()
    if content:
        (out / content).write_text("mine")
    with pytest.raises(RunFolderError, match="choose another --out"):
        RunFolder.create(out, {})
    assert [(entry.name, entry.read_text()) for entry in out.iterdir()] == (
        [(content, "mine")] if content else []
    )


def test_open_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        RunFolder.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "run", {"seed": 1})
    with pytest.raises(RunFolderError, match="in use"):
        RunFolder.open(tmp_path / "run")
    first.close()
    RunFolder.open(tmp_path / "run").close()


def _event(folder: RunFolder, stage: str, step: int, *, complete: bool = True) -> None:
    place = {"stage": stage, "step": step}
    for path in (folder.arrays_path(stage, step), folder.checkpoint_dir(stage, step) / "model.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    if complete:
        folder.commit(place, spectra=[{**place, "name": "q"}], evals=[{**place, "shift": "none"}])
    else:
        append_rows(folder.spectra_path, [{**place, "name": "q"}])


def test_rewind_drops_late_and_incomplete_events(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", {})
    for step in (0, 50, 100):
        _event(folder, "sft", step)
    _event(folder, "ppo", 0)
    _event(folder, "ppo", 5)
    _event(folder, "ppo", 10, complete=False)
    folder.rewind([("sft", 100), ("ppo", 5)])
    wanted = [("sft", 0), ("sft", 50), ("sft", 100), ("ppo", 0), ("ppo", 5)]
    for rows in (folder.metrics(), folder.spectra(), folder.evals()):
        assert [(row["stage"], row["step"]) for row in rows] == wanted
    assert not folder.arrays_path("ppo", 10).exists()
    assert not folder.checkpoint_dir("ppo", 10).exists()
    # The trainer knows no more than SFT step 50: later events are repeated, so their rows must go.
    folder.rewind([("sft", 50)])
    assert [(row["stage"], row["step"]) for row in folder.spectra()] == [("sft", 0), ("sft", 50)]
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == ["sft-0", "sft-50"]
    folder.rewind([])
    assert folder.metrics() == folder.evals() == []


def test_summary_is_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", {})
    folder.write_summary({"tracking_share": 0.01})
    assert json.loads(folder.summary_path.read_text()) == folder.summary() == {"tracking_share": 0.01}
