"""`rlspec track --alarm --stop`: told once, ended there, and the same after any interruption."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from track_toys import arguments, assert_same_run, invoke

from rlspec.errors import OptionError
from rlspec.run.alarm import segments_left
from rlspec.run.config import TrackConfig
from rlspec.run.folder import RunFolder
from rlspec.run.recorder import EventRecorder
from rlspec.run.segments import event_of
from rlspec.tasks.alarm import binomial_tail, correction
from rlspec.train.evaluation import EvalResult

pytestmark = pytest.mark.usefixtures("cache")
DEALS = 40
# Solved OOD deals, the same ones first: SFT peaks at step 10, the branch from there at its start.
OOD = {("sft", step): solved for step, solved in zip((0, 5, 10, 15, 20, 22), (10, 28, 30, 5, 30, 30))}
OOD |= {("ppo-from-10", step): solved for step, solved in ((2, 29), (4, 2), (6, 30))}
STOP = ("--alarm", "ood_accuracy", "--stop", "--ppo-from", "10,22")


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluations solve the deals of the table, whatever the model does."""
    at: list[tuple[str, int]] = []
    record = EventRecorder._record

    def recorded(self: EventRecorder, state: Any) -> None:
        at.append((self._segment.id, state.step))
        record(self, state)

    def evaluate(*args: Any, shift: str, **options: Any) -> EvalResult:
        solved = OOD[at[-1]] if shift == "both" else 20
        outcomes = [i < solved for i in range(DEALS)]
        return EvalResult(
            shift, DEALS, solved, solved, solved / DEALS, 0.0, 1.0, [1.0, 1.0], outcomes, {}, 0.0
        )

    monkeypatch.setattr(EventRecorder, "_record", recorded)
    monkeypatch.setattr("rlspec.run.recorder.evaluate", evaluate)
    yield


def events(folder: RunFolder) -> list[tuple[str, int]]:
    return [event_of(row) for row in folder.metrics()]


UNTIL_THE_FALL = [("sft", 0), ("sft", 5), ("sft", 10), ("sft", 15)]
STOPPED = [*UNTIL_THE_FALL, ("ppo-from-10", 0), ("ppo-from-10", 2), ("ppo-from-10", 4)]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return {}  # filled by the first test that asks, since the evaluations are planted test by test


def stopped_run(whole: dict[str, Any], model: Path, folder: Path) -> RunFolder:
    if "run" not in whole:
        result = invoke(*arguments(model, folder), *STOP)
        assert result.exit_code == 0, result.output
        whole["run"], whole["said"] = RunFolder(folder), result.stderr
    return whole["run"]


def test_a_stage_ends_where_its_score_fell_and_its_later_branches_are_not_run(
    whole: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    run = stopped_run(whole, model, tmp_path / "run")
    assert events(run) == STOPPED
    p = binomial_tail(25, 25) * correction(3)
    told = [line for line in whole["said"].splitlines() if "go back to" in line or "not run" in line]
    assert told[:2] == [
        f"sft: ood_accuracy fell from 75.0 % at step 10 to 12.5 % at step 15 (p = {p:.2g}): go back to "
        f"{run.checkpoint_dir('sft', 10)}; the stage ends here",
        f"ppo-from-10: {told[1].partition(': ')[2]}",
    ]
    assert told[2:] == ["ppo-from-22 is not run: sft ended at step 15, before step 22"]
    summary = run.summary()
    assert [(row["segment"], row["steps"]) for row in summary["segments"]] == [
        ("sft", 15),
        ("ppo-from-10", 4),
    ]
    assert [row["segment"] for row in summary["alarms"]] == ["sft", "ppo-from-10"]
    # The end of a stage has a checkpoint, and what its rotation is worth.
    assert run.checkpoint_dir("sft", 15).is_dir() and run.checkpoint_dir("ppo-from-10", 4).is_dir()
    ends = [row for row in run.spectra() if event_of(row) in (("sft", 15), ("ppo-from-10", 4))]
    assert ends and all(row["null_draws"] == 8 for row in ends)


def test_a_stopped_run_stays_stopped(whole: dict[str, Any], model: Path, tmp_path: Path) -> None:
    run = stopped_run(whole, model, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.path.glob("*.jsonl")}
    assert invoke("track", "--resume", "--out", str(run.path)).exit_code == 0
    assert {path.name: path.read_bytes() for path in run.path.glob("*.jsonl")} == before


def test_without_time_for_spectra_the_step_where_a_stage_ends_has_them(model: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    options = {"stages": "sft", "alarm": "ood_accuracy", "track_budget": "0.0001"}
    assert invoke(*arguments(model, run.path, **options), "--stop").exit_code == 0
    assert events(run) == UNTIL_THE_FALL
    assert list(dict.fromkeys(map(event_of, run.spectra()))) == [("sft", 0), ("sft", 15)]
    assert all(row["null_draws"] == 8 for row in run.spectra() if row["step"] == 15)


@pytest.mark.parametrize(
    ("at", "lost"),
    [(("sft", 10), False), (("sft", 15), False), (("sft", 15), True), (("ppo-from-10", 4), False)],
    ids=["before the fall", "at the fall", "at the fall, before the trainer's state", "at the branch's fall"],
)
def test_an_interruption_changes_no_decision_and_no_byte(
    at: tuple[str, int], lost: bool, whole: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    wanted = stopped_run(whole, model, tmp_path / "whole")
    folder = RunFolder(tmp_path / "run")
    committed = RunFolder.commit

    def commit(self: RunFolder, metrics: dict[str, Any], **rows: Any) -> None:
        committed(self, metrics, **rows)
        if event_of(metrics) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit", commit)
        assert invoke(*arguments(model, folder.path), *STOP).exit_code == 143
    assert events(folder)[-1] == at
    if lost:
        shutil.rmtree(folder.resume_dir(at[0]))
    result = invoke("track", "--resume", "--out", str(folder.path))
    assert result.exit_code == 0, result.output
    assert_same_run(folder, wanted)


def test_without_stop_the_alarm_is_told_once_and_the_training_goes_on(model: Path, tmp_path: Path) -> None:
    options = {"stages": "sft", "alarm": "ood_accuracy", "checkpoint_every": 20}
    result = invoke(*arguments(model, tmp_path / "run", **options))
    assert result.exit_code == 0 and events(RunFolder(tmp_path / "run"))[-1] == ("sft", 22)
    (line,) = [line for line in result.stderr.splitlines() if "go back to" in line]
    assert line.endswith("go back to step 10")  # which has no checkpoint


def test_a_row_of_an_incomplete_event_decides_nothing() -> None:
    """A run that is killed between the evaluations and the row of metrics has not seen them."""
    config = TrackConfig(alarm="ood_accuracy", stop=True, stages=("sft",), sft_steps=22)
    evals = [
        {
            "segment": "sft", "step": step, "shift": "both", "accuracy": solved / DEALS, "n": DEALS,
            "outcomes": "1" * solved + "0" * (DEALS - solved),
        }
        for (segment, step), solved in OOD.items() if segment == "sft" and step <= 15
    ]  # fmt: skip
    metrics = [{"segment": "sft", "step": step} for step in (0, 5, 10, 15)]
    assert [segment.steps for segment in segments_left(config, metrics, evals)] == [15]
    assert [segment.steps for segment in segments_left(config, metrics[:-1], evals)] == [22]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"alarm": "accuracy"},
            "^alarm='accuracy': no such score of shifts=none,both; there are id_accuracy, ood_accuracy$",
        ),
        ({"alarm": "ood_accuracy", "shifts": ("none",)}, "no such score .* there are id_accuracy$"),
        ({"stop": True}, "^stop=True needs alarm=, the score whose fall ends a stage$"),
    ],
)
def test_scores_that_are_not_taken_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        TrackConfig(**settings)


def test_every_evaluation_can_be_watched() -> None:
    config = TrackConfig(shifts=("none", "rule", "both"))
    assert config.accuracies == {"id_accuracy": "none", "rule_accuracy": "rule", "ood_accuracy": "both"}
    assert TrackConfig(shifts=("none", "rule")).accuracies == {"id_accuracy": "none", "ood_accuracy": "rule"}
