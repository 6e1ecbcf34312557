"""Studies on a tiny model: killed and continued, in processes and as jobs, refused, and their tables."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from study_toys import TINY, table, tiny_study
from train_toys import save_toy_model

from rlspec.cli.main import main
from rlspec.errors import RunFolderError
from rlspec.jobs.loading import load_model
from rlspec.study.cells import Cell
from rlspec.study.context import Context, context_of
from rlspec.study.folder import StudyFolder
from rlspec.study.job import Places, run_plan
from rlspec.study.plans import PLANS, StudyOptions, make_study
from rlspec.study.repairs import above_noise, restored
from rlspec.study.runner import run_study
from rlspec.tasks import evaluation_problems, get_task


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("study") / "model")


@pytest.fixture(scope="module")
def arguments(model: Path) -> list[str]:
    return tiny_study(model)


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing interrupted."""
    out = tmp_path_factory.mktemp("study") / "whole"
    result = invoke(*arguments, f"--out={out}")
    assert result.exit_code == 0, result.output
    return out


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_a_killed_study_goes_on_to_the_same_table(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "rlspec", *arguments, f"--out={out}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("3/"):  # cells done
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL and not (out / "table.csv").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}
    assert len(finished) >= 3
    again = invoke(*arguments, f"--out={out}")
    assert again.exit_code == 0, again.output
    assert table(out) == table(whole)
    # What was finished was not done again.
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_workers_change_no_result(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    assert invoke(*arguments, f"--out={tmp_path / 's'}", "--workers=2").exit_code == 0
    assert table(tmp_path / "s") == table(whole)


def test_ctrl_c_saves_what_workers_are_at(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    """A terminal sends it to all processes of its group; workers that got it twice would break off in a step."""
    command = [sys.executable, "-m", "rlspec", *arguments, f"--out={tmp_path / 's'}", "--workers=2"]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert driver.stderr is not None
    driver.stderr.readline()  # one cell is done, so there are workers
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    workers = [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    assert len(workers) == 2 and all(os.getpgid(worker) != driver.pid for worker in workers)
    os.killpg(driver.pid, signal.SIGINT)
    _, told = driver.communicate(timeout=300)
    assert driver.returncode == 130 and "Traceback" not in told and "broken off" not in told
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert invoke(*arguments, f"--out={tmp_path / 's'}").exit_code == 0
    assert table(tmp_path / "s") == table(whole)


def test_a_model_that_is_written_anew_is_another_study_s(
    arguments: list[str], model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(model, mine)
    shutil.copytree(whole, out)
    study = json.loads((out / "study.json").read_text())
    assert study["model_files"] and all(cell["settings"]["model"] == str(model) for cell in study["cells"])
    (out / "study.json").write_text(json.dumps(study | {"model_files": {"model.safetensors": [1, 2]}}))
    result = invoke(*arguments, f"--out={out}")
    assert result.exit_code == 2 and "its model was written anew since the study was begun (" in result.output
    monkeypatch.chdir(model.parent)  # a relative path is the same model from anywhere
    relative = [word.replace(str(model), model.name) for word in arguments]
    assert invoke(*relative, f"--out={whole}").exit_code == 0


def test_a_killed_worker_is_one_clear_error_and_the_study_goes_on(
    arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "rlspec", *arguments, f"--out={tmp_path / 's'}", "--workers=2"]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert driver.stderr is not None
    driver.stderr.readline()  # one cell is done, so there are workers
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    workers = [c for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, told = driver.communicate(timeout=300)
    assert driver.returncode == 1 and "Traceback" not in told
    assert "a worker was killed at" in told and "the same command" in told
    assert invoke(*arguments, f"--out={tmp_path / 's'}").exit_code == 0
    assert table(tmp_path / "s") == table(whole)


def test_jobs_of_a_cluster_change_no_result(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    from rlspec.study import slurm

    # submitit's stand-in for a cluster that runs jobs in this process, when they are asked for.
    monkeypatch.setattr(slurm.Cluster.__init__, "__defaults__", ("debug",))
    options = StudyOptions(model=str(model), **TINY)
    places = Places(executor="slurm", workers=2, threads=1, slurm={"partition": "cpu"})
    run_plan("duration", options, [0], tmp_path / "s", places)
    assert table(tmp_path / "s") == table(whole)


def test_without_submitit_the_line_says_what_to_install(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke(*arguments, f"--out={tmp_path / 's'}", "--executor=slurm")
    assert result.exit_code == 2 and "pip install 'rlspec[slurm]'" in result.output
    assert not (tmp_path / "s").exists()


def test_a_folder_of_other_settings_is_refused_and_left_alone(arguments: list[str], whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.glob("*.*")}
    for change in ("--sft-steps=5", "--threads=2"):
        result = invoke(*arguments, change, f"--out={whole}")
        assert result.exit_code == 2 and str(whole) in result.output
    assert {path: path.read_bytes() for path in whole.glob("*.*")} == before
    (whole.parent / "other").mkdir()
    (whole.parent / "other" / "mine.txt").write_text("mine")
    result = invoke(*arguments, f"--out={whole.parent / 'other'}")
    assert result.exit_code == 2 and "no study" in result.output


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--seeds=1.5", "--seeds '1.5' must be whole numbers"),
        ("--slurm=cpu", "--slurm 'cpu' must be name=value"),
        ("--slurm=mem=1,mem=2", "Error: --slurm mem=2: mem is given twice, 1 before\n"),
        ("--slurm=mem=1 --slurm=a=b,mem=1", "Error: --slurm mem=1: mem is given twice, 1 before\n"),
        ("--model=/nowhere", "no such folder; --model wants"),
        ("--threads=0", "--threads"),
    ],
)
def test_bad_options_are_told_as_they_were_given(given: str, shown: str, tmp_path: Path) -> None:
    result = invoke("study", "layers", *given.split(), f"--out={tmp_path / 's'}")
    assert result.exit_code == 2 and shown in result.output
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "given",
    ["--slurm=partition=cpu,timeout_min=60", "--slurm=partition=cpu --slurm=timeout_min=60"],
    ids=["with commas", "as options of their own"],
)
def test_every_setting_of_a_clusters_jobs_reaches_it(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[Places] = []

    def run_plan(plan: str, options: StudyOptions, seeds: Any, out: Path, places: Places) -> list[str]:
        reached.append(places)
        return []

    monkeypatch.setattr("rlspec.study.job.run_plan", run_plan)
    assert invoke("study", "layers", *given.split(), f"--out={tmp_path / 's'}").exit_code == 0
    assert reached[0].slurm == {"partition": "cpu", "timeout_min": "60"}


def test_seeds_may_be_added(model: Path) -> None:
    options = StudyOptions(model=str(model), **TINY)
    one, two = make_study("duration", options, [0]), make_study("duration", options, [0, 1])
    assert {c.digest for c in one.cells} < {c.digest for c in two.cells}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_a_tree_with_parents_first_and_at_kept_steps(plan: str) -> None:
    for quick in (True, False):
        kept: dict[str, list[int]] = {}
        for cell in make_study(plan, StudyOptions(quick=quick), [0, 1]).cells:
            if cell.parent is not None:
                assert cell.step in kept[cell.parent]
            kept[cell.digest] = cell.settings.get("keep", [])
        assert len(kept) > 8


def test_a_cells_digest_holds_its_ancestors_and_nothing_that_decides_nothing() -> None:
    parent = Cell("sft", {"seed": 0})
    child = Cell("measure", {"seed": 0}, parent.digest, 5, {"what": "sft"})
    assert replace(child, labels={}).digest == child.digest
    other = Cell("sft", {"seed": 1})
    changed = [replace(child, parent=other.digest), replace(child, step=6), replace(child, work="ppo")]
    assert len({child.digest, *(cell.digest for cell in changed)}) == 4


def test_the_duration_table_has_every_measured_cell(whole: Path) -> None:
    rows = list(csv.DictReader((whole / "table.csv").open()))
    assert [row["what"] for row in rows].count("ppo") >= 3 and rows[0]["what"] == "base"
    for row in rows:
        assert 0 <= float(row["id_low"]) <= float(row["id"]) <= float(row["id_high"]) <= 1
        assert float(row["validation_loss"]) > 0 and float(row["entropy_nats"]) > 0
    base, ppo = rows[0], rows[-1]
    assert float(base["kl_nats"]) == 0 == float(base["rotation_rad"]) and float(ppo["kl_nats"]) > 0
    assert not any(name.startswith("seconds") for name in rows[0])


def test_deals_that_choose_are_others_than_deals_that_report() -> None:
    task = get_task("general_points")
    for shift in ("none", "both"):
        keys = [p.key for p in evaluation_problems(task, 40, shift=shift)]
        assert len({*keys[:20]} & {*keys[20:]}) == 0


def context(model: Path) -> Context:
    options = StudyOptions(model=str(model), **TINY)
    return context_of(make_study("rank", options, [0]).cells[0].settings)


def tuned(model: Path) -> Any:
    changed = load_model(model, torch.device("cpu"))
    torch.manual_seed(0)
    for p in changed.parameters():
        p.data += 0.01 * torch.randn(p.shape)
    return changed


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    plain = {"rank": 0.5, "part": "top", "mode": "directions", "modules": "q,k,v", "layers": None}
    return {"kind": kind, **plain, "strength": 1.0, "shift_k": 0, **changes}


def test_the_line_ends_at_the_base_and_a_random_change_has_the_restorations_norm(model: Path) -> None:
    here, changed = context(model), tuned(model)
    assert restored(here, changed, {"kind": "line", "strength": 1.0}) == pytest.approx(1.0)
    for p, base in zip(changed.parameters(), here.base.parameters()):
        assert torch.allclose(p, base, atol=1e-7)
    found = [restored(here, tuned(model), settings(kind)) for kind in ("restoration", "random")]
    assert found[0] > 0 and found[1] == pytest.approx(found[0], rel=1e-4)


def test_one_direction_more_is_the_next_count(model: Path) -> None:
    here = context(model)
    # q is 32 x 32: half is 16 directions, one more 17.
    for by, count in ((-1, 15), (1, 17)):
        models = tuned(model), tuned(model)
        restored(here, models[0], settings("restoration", modules="q", shift_k=by))
        restored(here, models[1], settings("restoration", modules="q", rank=count))
        for a, b in zip(*(m.parameters() for m in models)):
            assert torch.equal(a, b)


def test_the_noise_floor_passes_a_spike_and_no_noise() -> None:
    torch.manual_seed(0)
    noise = torch.randn(120, 240, dtype=torch.float64) / 240**0.5
    assert above_noise(noise).norm() == 0
    u = torch.linalg.qr(torch.randn(120, 1, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(240, 1, dtype=torch.float64)).Q
    kept = above_noise(noise + 8 * u @ v.T)
    assert torch.linalg.matrix_rank(kept) == 1
    assert abs((u.T @ kept @ v).item()) == pytest.approx(8, rel=0.05)


def test_a_study_in_use_is_refused(whole: Path) -> None:
    from rlspec.io.lock import take_lock

    folder = StudyFolder(whole)
    study = folder.study()
    with take_lock(whole), pytest.raises(RunFolderError, match="in use"):
        run_study(study, folder, lambda: pytest.fail("nothing may run"))
