"""Packages that one feature needs: without them nothing else fails, and that feature says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlspec.run import tensorboard
from rlspec.run.manifest import Manifest
from rlspec.run.tensorboard import TensorBoardLog

ROOT = Path(__file__).resolve().parent.parent
METRICS: list[dict[str, Any]] = [
    {"stage": "sft", "step": 5 * i, "global_step": 5 * i, "loss": 1.0 / (1 + i)} for i in range(3)
]


def run_without(package: str, code: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process that cannot import ``package``."""
    code = f"import sys\nsys.modules[{package!r}] = None\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_tasks_need_no_gymnasium() -> None:
    code = "import rlspec.jobs.track\nfrom rlspec.tasks import *\nprint(get_task().name)"
    done = run_without("gymnasium", code)
    assert (done.stdout.strip(), done.returncode) == ("general_points", 0), done.stderr


def test_the_environment_without_gymnasium_says_what_to_install() -> None:
    done = run_without("gymnasium", "from rlspec.tasks import TaskEnv")
    assert done.stderr.splitlines()[-1] == (
        "rlspec.errors.MissingPackageError: rlspec.tasks.TaskEnv needs gymnasium, which is not installed: "
        "pip install 'rlspec[gymnasium]'"
    )


def test_track_without_trl_says_what_to_install_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["track", "--trainer", "trl", "--out", str(out)]
    done = run_without("trl", f"from rlspec.cli.main import main\nmain({command!r})")
    assert (done.returncode, done.stdout) == (2, "") and not out.exists()
    assert done.stderr == (
        "Error: training with --trainer 'trl' needs trl, which is not installed: pip install 'rlspec[trl]'\n"
    )


def test_what_gymnasium_itself_lacks_is_told_as_it_is() -> None:
    done = run_without("gymnasium.spaces", "from rlspec.tasks import TaskEnv")
    assert "MissingPackageError" not in done.stderr and "gymnasium.spaces" in done.stderr


def test_nothing_heavy_is_imported_for_a_run_that_has_not_begun() -> None:
    code = "import rlspec.jobs.track, sys; print({'gymnasium', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def points(folder: Path) -> dict[int, float]:
    """Step -> loss, as TensorBoard itself reads the folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = events.Scalars("train/loss")
    assert len({event.step for event in found}) == len(found)
    return {event.step: event.value for event in found}


def test_a_resumed_run_leaves_no_doubled_points_and_no_file_of_the_user_goes(tmp_path: Path) -> None:
    first = TensorBoardLog(tmp_path, METRICS[:2], [], Manifest(tmp_path))
    first.add({**METRICS[2], "loss": 7.0}, [])  # an event that the run was killed in
    first.close()
    (tmp_path / "notes.txt").write_text("mine")
    second = TensorBoardLog(tmp_path, METRICS[:2], [], Manifest(tmp_path))
    second.add(METRICS[2], [])
    second.close()
    assert points(tmp_path / "sft") == pytest.approx({row["global_step"]: row["loss"] for row in METRICS})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_branches_are_curves_of_their_own_that_begin_where_they_left_the_trunk(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, METRICS, [], Manifest(tmp_path))
    for start in (5, 10):
        for step in range(2):
            place = {"segment": f"ppo-from-{start}", "stage": "ppo", "step": step, "parent_step": start}
            log.add({**place, "global_step": start + 4 * step, "loss": 0.1 * step}, [])
    log.close()
    assert points(tmp_path / "sft").keys() == {0, 5, 10}
    assert points(tmp_path / "ppo-from-5") == pytest.approx({5: 0.0, 9: 0.1})
    assert points(tmp_path / "ppo-from-10") == pytest.approx({10: 0.0, 14: 0.1})


def test_without_tensorboard_nothing_is_written_and_what_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorBoardLog(tmp_path, METRICS, [], Manifest(tmp_path)).close()
    monkeypatch.setattr(tensorboard, "installed", lambda: False)
    log = TensorBoardLog(tmp_path, METRICS[:1], [], Manifest(tmp_path))
    log.add(METRICS[1], [])
    log.close()
    assert points(tmp_path / "sft").keys() == {0, 5, 10}


@pytest.mark.parametrize("package", ["gymnasium", "tensorboard", "trl"])
def test_the_extra_that_the_messages_name_exists_and_the_tests_have_it(package: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    required, extras = text.split("[project.optional-dependencies]")
    assert f'"{package}>=' not in required
    assert f'\n{package} = ["{package}>=' in extras
    assert f'"{package}>=' in extras.split("test = [")[1].split("]")[0]
