"""A run that was stopped by Ctrl-C or SIGTERM goes on as if it had not been; other settings are refused."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from click.testing import Result
from track_toys import OPTIONS, arguments, assert_same_run, invoke, start_and_signal

from rlspec.run.folder import RunFolder
from rlspec.run.progress import Progress

pytestmark = pytest.mark.usefixtures("cache")


def test_ctrl_c_stops_at_a_step_and_can_be_resumed(
    finished: tuple[RunFolder, Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Progress.step

    def pressed(self: Progress, number: int, **figures: float) -> None:
        step(self, number, **figures)
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)

    folder = RunFolder(tmp_path / "my run")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", pressed)
        result = invoke(*arguments(model, folder.path))
    assert result.exit_code == 130
    assert f"rlspec track --resume --out '{folder.path}'" in result.stderr
    assert (folder.metrics()[-1]["stage"], folder.metrics()[-1]["step"]) == ("sft", 5)
    assert invoke("track", "--resume", "--out", str(folder.path)).exit_code == 0
    assert_same_run(folder, finished[0])


def test_sigterm_saves_and_stops_as_ctrl_c_does(
    finished: tuple[RunFolder, Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    code, told = start_and_signal(arguments(model, folder.path), "sft", 5, signal.SIGTERM)
    assert code == 143 and "Traceback" not in told
    assert told.endswith(
        f"Stopped; the run is saved. To continue it: rlspec track --resume --out {folder.path}\n"
    )
    assert (folder.resume_dir("sft") / "resume.pt").exists() and not folder.summary_path.exists()

    # The resumed run, which holds no resume state while it trains.
    step = Progress.step

    def watched(self: Progress, number: int, **figures: float) -> None:
        step(self, number, **figures)
        assert "resume.pt" not in Path("/proc/self/maps").read_text()

    monkeypatch.setattr(Progress, "step", watched)
    assert invoke("track", "--resume", "--out", str(folder.path)).exit_code == 0
    assert_same_run(folder, finished[0])
    assert not any((folder.path / "resume").iterdir())


def test_a_stop_during_the_last_step_of_a_stage_begins_no_other(
    finished: tuple[RunFolder, Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Progress.step

    def terminated(self: Progress, number: int, **figures: float) -> None:
        step(self, number, **figures)
        if number == OPTIONS["sft_steps"]:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", terminated)
        result = invoke(*arguments(model, folder.path))
    assert result.exit_code == 143
    assert (folder.metrics()[-1]["stage"], folder.metrics()[-1]["step"]) == ("sft", 22)
    assert invoke("track", "--resume", "--out", str(folder.path)).exit_code == 0
    assert_same_run(folder, finished[0])
    assert not any((folder.path / "resume").iterdir())


def test_resuming_a_finished_run_trains_no_more(finished: tuple[RunFolder, Result]) -> None:
    folder, first = finished
    before = folder.metrics_path.read_bytes()
    restored = folder.path / "checkpoints" / "sft-22-restored" / "model.safetensors"
    restored.parent.mkdir()
    restored.write_text("mine")
    again = invoke("track", "--resume", "--out", str(folder.path))
    assert again.exit_code == 0 and again.stdout == first.stdout
    assert folder.metrics_path.read_bytes() == before
    assert restored.read_text() == "mine"
    shutil.rmtree(restored.parent)


def test_other_settings_and_existing_folders_are_refused(
    finished: tuple[RunFolder, Result], model: Path
) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    result = invoke(*arguments(model, folder.path))
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {folder.path} already holds a run; continue it with --resume, or choose another folder\n"
    )
    result = invoke("track", "--resume", "--out", str(folder.path), "--seed", "1")
    assert result.exit_code == 2 and result.stderr.endswith("--seed 0, not 1\n")
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
