"""Studies on a real Slurm cluster of one machine: the same table as here, whatever is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_toy import ask, cluster, without_slurm
from study_toys import table, tiny_study
from train_toys import save_toy_model

pytest.importorskip("submitit", reason="submitit is not installed")
pytestmark = pytest.mark.skipif(without_slurm(), reason="no Slurm, or not root's")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    folder = Path(tempfile.mkdtemp(prefix="sl"))
    try:
        with cluster(folder) as environment:
            environment["RLSPEC_CACHE"] = str(folder / "cache")
            yield environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_study(save_toy_model(tmp_path_factory.mktemp("study") / "model"))


@pytest.fixture(scope="module")
def whole(arguments: list[str], slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of the study run without a cluster."""
    out = tmp_path_factory.mktemp("study") / "here"
    here = subprocess.run(
        [sys.executable, "-m", "rlspec", *arguments, f"--out={out}"], env=slurm, capture_output=True
    )
    assert here.returncode == 0, here.stderr
    return table(out)


def command(arguments: list[str], out: Path) -> list[str]:
    return [sys.executable, "-m", "rlspec", *arguments, f"--out={out}", "--executor=slurm", "--workers=2"]


def begin(arguments: list[str], out: Path, slurm: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(arguments, out), env=slurm, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(arguments: list[str], out: Path, slurm: dict[str, str]) -> None:
    done = subprocess.run(command(arguments, out), env=slurm, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "sacct" not in done.stderr


def until(happened: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.2)


def queue(slurm: dict[str, str], state: str) -> list[str]:
    return ask(slurm, "squeue", "--me", "--noheader", f"--states={state}", "--format=%A").split()


def cells(out: Path) -> int:
    return len(list(out.glob("cells/*/result.json")))


def test_a_killed_study_waits_for_jobs_that_it_left(
    arguments: list[str], whole: bytes, slurm: dict[str, str], tmp_path: Path
) -> None:
    driver = begin(arguments, tmp_path / "s", slurm)
    until(lambda: cells(tmp_path / "s") >= 1 and queue(slurm, "running"), driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    finish(arguments, tmp_path / "s", slurm)
    assert table(tmp_path / "s") == whole


def test_a_cancelled_job_is_one_clear_error_and_the_study_goes_on(
    arguments: list[str], whole: bytes, slurm: dict[str, str], tmp_path: Path
) -> None:
    driver = begin(arguments, tmp_path / "s", slurm)
    until(lambda: queue(slurm, "running"), driver)
    (job, *_) = queue(slurm, "running")
    subprocess.run(["scancel", "--signal=KILL", "--full", job], env=slurm, check=True)
    subprocess.run(["scancel", job], env=slurm, check=True)
    _, told = driver.communicate(timeout=300)
    assert driver.returncode == 1 and "Traceback" not in told
    assert re.search(
        rf"job {job} was ended by the cluster .*; its log is \S+{job}\S*\. What is finished", told
    ), told
    until(lambda: not queue(slurm, "pending,running,completing"))
    finish(arguments, tmp_path / "s", slurm)
    assert table(tmp_path / "s") == whole


def test_ctrl_c_leaves_no_job_behind(arguments: list[str], slurm: dict[str, str], tmp_path: Path) -> None:
    driver = begin(arguments, tmp_path / "s", slurm)
    until(lambda: queue(slurm, "running"), driver)
    os.killpg(driver.pid, signal.SIGINT)
    driver.communicate(timeout=300)
    assert driver.returncode == 130
    until(lambda: not queue(slurm, "pending,running,completing"))


def test_what_a_cell_raises_is_told(arguments: list[str], slurm: dict[str, str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(arguments[4].partition("=")[2], model)
    mine = [*arguments[:4], f"--model={model}", *arguments[5:]]
    driver = begin(mine, tmp_path / "s", slurm)
    until(lambda: cells(tmp_path / "s") >= 1, driver)
    (model / "model.safetensors").write_bytes(b"no checkpoint")
    _, told = driver.communicate(timeout=300)
    assert driver.returncode == 1 and "Traceback" not in told
    assert re.search(r"job \d+ failed, rlspec.errors.CheckpointError: \S*/model\S* .*; its log is", told), (
        told
    )
