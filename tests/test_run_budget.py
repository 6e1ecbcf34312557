"""A run whose tracking may take a share of its time: spectra are left out, and nothing else of the run changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from integration_toys import Clock as Seconds
from report_toys import make_tree
from track_toys import arguments, assert_same_run, invoke, stop_at, without_seconds

from rlspec.errors import OptionError
from rlspec.report.data import read_run
from rlspec.report.html import write_comparison, write_report
from rlspec.report.tables import figures
from rlspec.run.config import TrackConfig
from rlspec.run.folder import RunFolder
from rlspec.run.recorder import Clock, EventRecorder
from rlspec.run.segments import event_of
from rlspec.spectra import SpectralTracker

pytestmark = pytest.mark.usefixtures("cache")

# With one second a step, one a measurement, and a share of 14 %: after the one at step 0 the second needs 14.3 seconds
# with its own, the third 21.4, the fourth 28.6, which is the last of SFT's and is made at 26, the fifth 35.7.
MEASURED = [("sft", 0), ("sft", 15), ("sft", 20), ("sft", 22), ("ppo", 0), ("ppo", 6)]


@contextmanager
def timed() -> Iterator[None]:
    """Within, a step takes a second, a measurement another, and everything else no time."""
    seconds = Seconds()

    def slow(right: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*args: Any, **options: Any) -> Any:
            seconds.now += 1
            return right(*args, **options)

        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlspec.jobs.track.Clock", lambda: Clock(now=seconds))
        patch.setattr(SpectralTracker, "measure", slow(SpectralTracker.measure))
        patch.setattr(EventRecorder, "on_step", slow(EventRecorder.on_step))
        yield


@pytest.fixture(scope="module")
def limited(model: Path, tmp_path_factory: pytest.TempPathFactory, cache: None) -> tuple[RunFolder, Result]:
    """A run with a budget, to be read only, and what the command printed."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "limited")
    with timed():
        result = invoke(*arguments(model, folder.path, track_budget="14%"))
    assert result.exit_code == 0, result.output
    return folder, result


def without_run(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "run"} for row in without_seconds(rows)]


def test_spectra_beyond_the_budget_are_left_out_and_nothing_else(
    finished: tuple[RunFolder, Result], limited: tuple[RunFolder, Result]
) -> None:
    (whole, _), (folder, result) = finished, limited
    assert list(dict.fromkeys(map(event_of, folder.spectra()))) == MEASURED
    files = {f"{segment}-{step}.safetensors" for segment, step in MEASURED}
    assert {path.name for path in (folder.path / "spectra").iterdir()} == files
    # What was measured is what it is without a limit, and so are the evaluations and the checkpoints of all events.
    assert without_run(folder.spectra()) == without_run(
        [row for row in whole.spectra() if event_of(row) in MEASURED]
    )
    assert without_run(folder.metrics()) == without_run(whole.metrics())
    assert without_run(folder.evals()) == without_run(whole.evals())
    kept = [sorted(p.name for p in (each.path / "checkpoints").iterdir()) for each in (folder, whole)]
    assert kept[0] == kept[1]
    told = [line for line in result.stderr.splitlines() if "left out" in line]
    assert told == [
        "tracking took 1 of 6 s so far: the spectra of sft 5 are left out (track_budget='14%'), later ones may be too"
    ]
    assert folder.report_path.exists()


def test_a_resumed_run_goes_on_with_what_was_spent(
    limited: tuple[RunFolder, Result], model: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    with timed():
        stop_at(arguments(model, folder.path, track_budget="14%"), "sft", 5)
    before = folder.spectra_path.read_bytes()
    assert list(dict.fromkeys(map(event_of, folder.spectra()))) == MEASURED[:1]
    # Were what was spent forgotten, or how long one takes, there was time at step 10; were the time, none at step 15.
    with timed():
        assert invoke("track", "--resume", "--out", str(folder.path)).exit_code == 0
    assert_same_run(folder, limited[0])
    assert folder.spectra_path.read_bytes().startswith(before)


def test_steps_that_a_branch_starts_from_are_measured(model: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    changes = {"ppo_from": "5,10", "ppo_updates": 1, "sft_steps": 15, "track_budget": "0.0001"}
    with timed():
        assert invoke(*arguments(model, folder.path, **changes)).exit_code == 0
    assert list(dict.fromkeys(map(event_of, folder.spectra()))) == [
        *(("sft", step) for step in (0, 5, 10, 15)),
        *((f"ppo-from-{point}", step) for point in (5, 10) for step in (0, 1)),
    ]


def test_a_run_without_a_limit_is_written_as_before(finished: tuple[RunFolder, Result]) -> None:
    folder, _ = finished
    assert "track_budget" not in yaml.safe_load(folder.config_path.read_text())
    assert all("seconds_last_measurement" not in row for row in folder.metrics())
    limited = TrackConfig(track_budget="1%")
    assert TrackConfig.from_settings(limited.to_settings()) == limited
    assert TrackConfig.from_settings(TrackConfig().to_settings()) == TrackConfig()
    # YAML has a share as a number.
    assert TrackConfig.from_settings({"track-budget": 0.01}).track_budget == "0.01"


def test_a_wrong_budget_is_told_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    result = invoke(*arguments(model, tmp_path / "run", track_budget="fast"))
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert result.stderr == (
        "Error: --track-budget 'fast' is not valid: give a share of the time such as '1%' or 0.01\n"
    )
    with pytest.raises(OptionError, match=r"^track_budget='1' is not valid"):
        TrackConfig(track_budget="1")


@pytest.mark.parametrize("done", [True, False])
def test_reports_stand_events_without_spectra(tmp_path: Path, done: bool) -> None:
    ood = {("sft", 0): 10, ("sft", 50): 60, ("sft", 100): 20, ("ppo", 0): 20, ("ppo", 20): 40}
    settings = {"sft_steps": 100, "ppo_from": (100,)}
    whole, part = (make_tree(tmp_path / name, ood, finished=done, **settings) for name in ("whole", "part"))
    spectra = part / "spectra.jsonl"
    lines = spectra.read_text().splitlines(keepends=True)
    spectra.write_text("".join(line for line in lines if json.loads(line)["step"] != 50))
    # The best step of SFT is the one without spectra: its accuracies stay, its rotation is not known.
    run = read_run(part)
    (peak,) = (row for row in figures(run) if row[1] == "sft 50")
    (measured,) = (row for row in figures(read_run(whole)) if row[1] == "sft 50")
    assert peak[:5] == measured[:5] and peak[5:] == ["–", "–", "–"] and "–" not in measured
    for page in (write_report(part), write_comparison([whole, part])):
        assert "</html>" in page.read_text()
    assert invoke("report", str(part)).exit_code == 0
