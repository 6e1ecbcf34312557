"""The run folder's files: whole rows only, no duplicates, nothing overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlspec.errors import RunFolderError
from rlspec.io.jsonl import append_rows, keep_rows, read_rows, repair
from rlspec.run.folder import RunFolder
from rlspec.run.progress import eta_text
from rlspec.run.segments import event_of
from rlspec.run.tensorboard import TensorBoardLog


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
    with pytest.raises(RunFolderError, match="choose another folder"):
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
    place: dict[str, object] = {"stage": stage, "step": step}
    if "-" in stage:
        place = {"segment": stage, "stage": stage.split("-")[0], "step": step}
    for path in (folder.arrays_path(stage, step), folder.checkpoint_dir(stage, step) / "model.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for path in (folder.arrays_path(stage, step), folder.checkpoint_dir(stage, step)):
        folder.manifest.record(path, path)
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


def test_rewind_knows_branches_apart(tmp_path: Path) -> None:
    """Two branches have the same stage and the same steps."""
    folder = RunFolder.create(tmp_path / "run", {})
    _event(folder, "sft", 100)
    for segment in ("ppo-from-50", "ppo-from-100"):
        for step in (0, 5):
            _event(folder, segment, step)
    folder.rewind([("sft", 100), ("ppo-from-50", 5), ("ppo-from-100", 0)])
    wanted = [("sft", 100), ("ppo-from-50", 0), ("ppo-from-50", 5), ("ppo-from-100", 0)]
    for rows in (folder.metrics(), folder.spectra(), folder.evals()):
        assert [event_of(row) for row in rows] == wanted
    assert folder.checkpoint_dir("ppo-from-50", 5).exists()
    assert not folder.checkpoint_dir("ppo-from-100", 5).exists()


def _begun_run(tmp_path: Path) -> RunFolder:
    """A run with events at 0, 50 and 100, of which the trainer knows the first two."""
    folder = RunFolder.create(tmp_path / "run", {})
    for step in (0, 50, 100):
        _event(folder, "sft", step)
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rewind_leaves_what_the_run_did_not_write(tmp_path: Path) -> None:
    folder = _begun_run(tmp_path)
    mine = [
        "checkpoints/sft-300-restored/model.safetensors",
        "checkpoints/sft-75/model.safetensors",
        "checkpoints/best",
        "spectra/sft-60.safetensors",
        "spectra/notes.txt",
        ".hidden",
    ]
    for name in mine:
        path = folder.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")
    for points in ([("sft", 100)], [("sft", 50)], []):
        folder.rewind(points)
        assert all((folder.path / name).read_text() == f"mine: {name}" for name in mine)
    assert not folder.arrays_path("sft", 0).exists() and not folder.checkpoint_dir("sft", 0).exists()


def _add(folder: RunFolder) -> str:
    (folder.checkpoint_dir("sft", 100) / "notes.txt").write_text("mine")
    return "sft-100: it holds notes.txt"


def _replace(folder: RunFolder) -> str:
    (folder.checkpoint_dir("sft", 100) / "model.safetensors").write_text("restored")
    return "sft-100: its model.safetensors was changed"


def _touch(folder: RunFolder) -> str:
    # Another model of the same size, written a minute later.
    path = folder.checkpoint_dir("sft", 100) / "model.safetensors"
    path.write_text("y")
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 60))
    return "sft-100: its model.safetensors was changed"


def _link(folder: RunFolder) -> str:
    checkpoint = folder.checkpoint_dir("sft", 100)
    checkpoint.rename(folder.path / "elsewhere")
    checkpoint.symlink_to(folder.path / "elsewhere")
    return "sft-100: it is a link now"


def _change_arrays(folder: RunFolder) -> str:
    folder.arrays_path("sft", 100).write_text("mine")
    return "sft-100.safetensors: it was changed"


def _take_the_place(folder: RunFolder) -> str:
    folder.checkpoint_dir("sft", 150).mkdir()
    return "sft-150: the run would write it"


@pytest.mark.parametrize("change", [_add, _replace, _touch, _link, _change_arrays, _take_the_place])
def test_rewind_refuses_to_remove_or_replace_the_users_work(
    tmp_path: Path, change: Callable[[RunFolder], str]
) -> None:
    folder = _begun_run(tmp_path)
    message = change(folder)
    before = _contents(folder.path)
    to_write = [folder.checkpoint_dir("sft", step) for step in (0, 50, 100, 150)]
    with pytest.raises(RunFolderError, match=f"{message}.*move it elsewhere"):
        folder.rewind([("sft", 50)], to_write)
    assert _contents(folder.path) == before


@pytest.mark.parametrize(
    "row",
    [
        {"path": "checkpoints/../../mine", "files": None},
        {"path": "tb/../../mine", "files": None},
        {"path": "checkpoints/sft-5", "files": {"../../../mine": [4, 0]}},
        {"path": "checkpoints/sft-5", "files": {"/mine": [4, 0]}},
        {"path": "checkpoints/sft-5"},
        {"path": 5, "files": None},
        {"path": "checkpoints/sft-5", "files": {"a": ["4", 0]}},
    ],
)
def test_a_foreign_manifest_deletes_nothing_outside_its_folder(
    tmp_path: Path, row: dict[str, object]
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    RunFolder.create(tmp_path / "run", {}).close()
    (tmp_path / "run" / "checkpoints" / "sft-5").mkdir(parents=True)
    folder = RunFolder.open(tmp_path / "run")
    append_rows(folder.manifest.path, [row])
    with pytest.raises(RunFolderError, match=r"written\.jsonl: .* is no entry that a run writes"):
        folder.rewind([])
    assert mine.read_text() == "mine"


def test_event_files_of_others_stay(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", {})
    events = folder.tensorboard_dir / "sft"
    events.mkdir(parents=True)
    other = events / "events.out.tfevents.1.host.1.0"
    other.write_text("mine")
    row = {"stage": "sft", "step": 0, "global_step": 0}
    for _ in range(2):
        TensorBoardLog(folder.tensorboard_dir, [row], [], folder.manifest).close()
        assert len(list(events.iterdir())) == 2
    assert other.read_text() == "mine"


@pytest.mark.parametrize("manifest", ["kept", "of before there was one"])
def test_a_resumed_run_shows_each_point_once(tmp_path: Path, manifest: str) -> None:
    """As TensorBoard itself reads the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder.create(tmp_path / "run", {})
    rows = [{"stage": "sft", "step": s, "global_step": s, "loss": float(s)} for s in range(3)]

    def shown() -> list[int]:
        events = EventAccumulator(str(folder.tensorboard_dir / "sft"))
        events.Reload()
        return [point.step for point in events.Scalars("train/loss")]

    for count in (2, 3):
        TensorBoardLog(folder.tensorboard_dir, rows[:count], [], folder.manifest).close()
        if manifest != "kept":
            folder.manifest.path.unlink()
        assert shown() == list(range(count))
    if manifest != "kept":
        assert len(list((folder.tensorboard_dir / "sft").iterdir())) == 2  # nothing was deleted


def test_summary_is_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", {})
    folder.write_summary({"tracking_share": 0.01})
    assert json.loads(folder.summary_path.read_text()) == folder.summary() == {"tracking_share": 0.01}


@pytest.mark.parametrize(("seconds", "told"), [(0.9, "0:00"), (61.9, "1:01"), (3600.0, "60:00")])
def test_the_time_that_is_left_is_told_in_minutes_and_seconds(seconds: float, told: str) -> None:
    assert eta_text(seconds) == f"ETA {told}"
