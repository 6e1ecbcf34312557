"""`rlspec track` on a tiny random model, from start to end or stopped on the way, and what makes two runs the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rlspec.cli.main import main
from rlspec.run.folder import RunFolder
from rlspec.run.segments import event_of

OPTIONS = {
    "every": 5,
    "ppo_every": 2,
    "sft_steps": 22,
    "ppo_updates": 6,
    "turns_per_update": 8,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "ppo_learning_rate": 1e-4,
    "deals": 6,
    "turns": 2,
    "threads": 1,
    "device": "cpu",
}


def arguments(model: Path, out: Path, **changes: Any) -> list[str]:
    options = {"model": model, "out": out, **OPTIONS, **changes}
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return ["track", *(part for pair in flags for part in pair)]


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def assert_same_run(found: RunFolder, wanted: RunFolder) -> None:
    assert without_seconds(found.metrics()) == without_seconds(wanted.metrics())
    assert found.spectra() == wanted.spectra()
    assert without_seconds(found.evals()) == without_seconds(wanted.evals())
    for name in ("spectra", "checkpoints"):
        files = {
            path.relative_to(wanted.path): path for path in (wanted.path / name).rglob("*") if path.is_file()
        }
        assert files.keys() == {
            path.relative_to(found.path) for path in (found.path / name).rglob("*") if path.is_file()
        }
        for relative, path in files.items():
            assert (found.path / relative).read_bytes() == path.read_bytes(), relative


# `python -m rlspec`, which signals itself: a watcher beside it may come too late on a busy machine.
SIGNALLED = """
import os, runpy, sys
from rlspec.run.folder import RunFolder
stage, step, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
commit = RunFolder.commit
def signalled(self, metrics, **rows):
    commit(self, metrics, **rows)
    if (metrics["segment"], metrics["step"]) == (stage, step):
        os.kill(os.getpid(), number)
RunFolder.commit = signalled
sys.argv[1:4] = []
runpy.run_module("rlspec", run_name="__main__", alter_sys=True)
"""


def start_and_signal(arguments: list[str], stage: str, step: int, number: int) -> tuple[int, str]:
    """Run the command in a process of its own that gets a signal as soon as the row of (stage, step) is there.

    Returns its exit code and what it said on stderr.
    """
    command = [sys.executable, "-c", SIGNALLED, stage, str(step), str(int(number)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def start_and_kill(arguments: list[str], folder: RunFolder, stage: str, step: int) -> None:
    code, told = start_and_signal(arguments, stage, step, signal.SIGKILL)
    assert code == -signal.SIGKILL, told
    assert event_of(folder.metrics()[-1]) == (stage, step)


def stop_at(arguments: list[str], segment: str, step: int) -> None:
    """Run the command in this process and send it SIGTERM during a step."""
    committed = RunFolder.commit

    def commit(self: RunFolder, metrics: dict[str, Any], **rows: Any) -> None:
        committed(self, metrics, **rows)
        if event_of(metrics) == (segment, step):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit", commit)
        assert invoke(*arguments).exit_code == 143


def finished_run(model: Path, out: Path) -> tuple[RunFolder, Result]:
    """A run from start to end in one go, and what the command printed."""
    result = invoke(*arguments(model, out))
    assert result.exit_code == 0, result.output
    return RunFolder(out), result
