"""The main job on a tiny random model: rows, resumption after SIGKILL, SIGTERM and Ctrl-C, and refusals on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
)

from rlspec.cli.main import main
from rlspec.io.jsonl import append_rows, read_rows
from rlspec.jobs.track import _seconds_before
from rlspec.models.vocabulary import make_tokenizer
from rlspec.report.data import read_run
from rlspec.report.verdict import verdict
from rlspec.run.folder import RunFolder
from rlspec.run.progress import Progress
from rlspec.run.segments import Segment, event_of
from rlspec.tasks import mcnemar

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


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def arguments(model: Path, out: Path, **changes: Any) -> list[str]:
    options = {"model": model, "out": out, **OPTIONS, **changes}
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return ["track", *(part for pair in flags for part in pair)]


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Result]:
    """A run from start to end in one go."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = invoke(*arguments(model, out))
    assert result.exit_code == 0, result.output
    return RunFolder(out), result


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


BRANCHES = {"ppo_from": "5,8", "sft_steps": 10, "ppo_updates": 2, "ppo_every": 1}


@pytest.fixture(scope="module")
def tree(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with two branches, from start to end in one go."""
    out = tmp_path_factory.mktemp("runs") / "tree"
    result = invoke(*arguments(model, out, **BRANCHES))
    assert result.exit_code == 0, result.output
    return RunFolder(out)


def test_rows_of_a_tree(tree: RunFolder) -> None:
    events = [("sft", step) for step in (0, 5, 8, 10)]
    events += [(f"ppo-from-{start}", step) for start in (5, 8) for step in (0, 1, 2)]
    rows = {event_of(row): row for row in tree.metrics()}
    assert list(rows) == events and len(tree.metrics()) == len(events)
    assert [event_of(row) for row in tree.spectra()] == [e for e in events for _ in range(6)]
    assert [(*event_of(row), row["shift"]) for row in tree.evals()] == [
        (*event, shift) for event in events for shift in ("none", "both")
    ]
    assert {row["run"] for row in (*tree.metrics(), *tree.spectra(), *tree.evals())} == {tree.run_id}
    for start in (5, 8):
        first, origin = rows[f"ppo-from-{start}", 0], rows["sft", start]
        assert (first["parent_segment"], first["parent_step"]) == ("sft", start)
        assert first["parent_weights"] == origin["weights"]
        assert first["global_step"] == origin["global_step"] == start
        same = ("id_accuracy", "ood_accuracy", "kl_base_nats_per_token")
        assert [first[name] for name in same] == [origin[name] for name in same]
        before, after = (
            [row["delta_frobenius"] for row in tree.spectra() if event_of(row) == event]
            for event in (("sft", start), (f"ppo-from-{start}", 0))
        )
        assert before == after
    assert rows["sft", 5]["weights"] != rows["sft", 8]["weights"]
    assert sorted(path.name for path in tree.tensorboard_dir.iterdir()) == ["ppo-from-5", "ppo-from-8", "sft"]
    seconds = [row["seconds_training"] for row in tree.metrics()]
    assert seconds == sorted(seconds)


def test_branches_start_from_their_own_weights(tree: RunFolder, model: Path, tmp_path: Path) -> None:
    """Each is bit for bit the run that has no other branch; the other's training leaves no trace in it."""
    for start in (5, 8):
        alone = RunFolder(tmp_path / f"from-{start}")
        changes = {**BRANCHES, "ppo_from": start, "sft_steps": 10}
        assert invoke(*arguments(model, alone.path, **changes)).exit_code == 0
        weights = (
            folder.checkpoint_dir(segment, 2) / "model.safetensors"
            for folder, segment in ((alone, "ppo"), (tree, f"ppo-from-{start}"))
        )
        assert next(weights).read_bytes() == next(weights).read_bytes()


def test_resume_after_sigkill_in_each_segment(tree: RunFolder, model: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    again = ["track", "--resume", "--out", str(folder.path)]
    start_and_kill(arguments(model, folder.path, **BRANCHES), folder, "sft", 8)
    start_and_kill(again, folder, "ppo-from-5", 1)
    start_and_kill(again, folder, "ppo-from-8", 1)
    assert not folder.summary_path.exists()
    # What a kill in the middle of a write would leave.
    with folder.metrics_path.open("ab") as file:
        file.write(b'{"stage": "ppo", "st')
    assert invoke(*again).exit_code == 0
    assert_same_run(folder, tree)


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


def test_a_branch_does_not_start_from_other_weights(tree: RunFolder, model: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    stop_at(arguments(model, folder.path, **BRANCHES), "ppo-from-5", 1)
    parent = folder.checkpoint_dir("sft", 8) / "model.safetensors"
    own = parent.read_bytes()
    times = parent.stat().st_atime_ns, parent.stat().st_mtime_ns
    parent.write_bytes((folder.checkpoint_dir("sft", 10) / "model.safetensors").read_bytes())
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    again = ("track", "--resume", "--out", str(folder.path))
    refused = invoke(*again)
    assert refused.exit_code == 2 and refused.stderr == (
        f"Error: {parent.parent}: its weights are not those that this run wrote; ppo-from-8 starts from them: put "
        "them back to continue\n"
    )
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    parent.unlink()
    parent.write_bytes(own)
    os.utime(parent, ns=times)
    assert invoke(*again).exit_code == 0
    assert_same_run(folder, tree)


def as_before_branches(folder: RunFolder) -> None:
    """The folder of a run with one branch from the end of SFT, as versions that knew no other wrote it."""
    new = ("run", "segment", "parent_segment", "parent_step", "parent_weights", "weights")
    for path in (folder.metrics_path, folder.spectra_path, folder.evals_path):
        rows = [{name: value for name, value in row.items() if name not in new} for row in read_rows(path)]
        path.unlink()
        append_rows(path, rows)
    settings = folder.settings() | {"ppo_from": None}
    folder.config_path.write_text(yaml.safe_dump(settings, sort_keys=False))
    if folder.summary_path.exists():
        summary = folder.summary()
        for name in ("run", "segments", "gains"):
            del summary[name]
        folder.write_summary(summary)


def test_a_finished_run_from_before_branches_opens(
    finished: tuple[RunFolder, Result], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "old")
    shutil.copytree(finished[0].path, folder.path)
    told = verdict(read_run(folder.path))
    as_before_branches(folder)
    assert "segment" not in folder.metrics_path.read_text()
    assert verdict(read_run(folder.path)) == told
    assert invoke("report", str(folder.path)).exit_code == 0
    before = folder.metrics_path.read_bytes()
    again = invoke("track", "--resume", "--out", str(folder.path))
    assert again.exit_code == 0, again.output
    assert again.stdout.replace(str(folder.path), "") == finished[1].stdout.replace(str(finished[0].path), "")
    assert folder.metrics_path.read_bytes() == before


def test_a_run_from_before_branches_is_finished(
    finished: tuple[RunFolder, Result], model: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "old")
    stop_at(arguments(model, folder.path), "ppo", 2)
    as_before_branches(folder)
    result = invoke("track", "--resume", "--out", str(folder.path))
    assert result.exit_code == 0, result.output
    for path in (finished[0].path / "checkpoints").rglob("*.safetensors"):
        assert (folder.path / path.relative_to(finished[0].path)).read_bytes() == path.read_bytes()


def test_seconds_of_training_are_counted_once() -> None:
    rows = [{"stage": "sft", "step": 0, "seconds_training": 3.0}]
    rows += [
        {"segment": "ppo-from-5", "stage": "ppo", "step": s, "seconds_training": 4.0 + s} for s in range(3)
    ]
    assert _seconds_before(rows, Segment("ppo-from-5", "ppo", 9, ("sft", 5))) == 3.0
    assert _seconds_before(rows, Segment("ppo-from-8", "ppo", 9, ("sft", 8))) == 6.0
    assert _seconds_before([], Segment("sft", "sft", 9)) == 0.0


def test_rows_of_a_run(finished: tuple[RunFolder, Result]) -> None:
    folder, _ = finished
    events = [("sft", 0), ("sft", 5), ("sft", 10), ("sft", 15), ("sft", 20), ("sft", 22)]
    events += [("ppo", 0), ("ppo", 2), ("ppo", 4), ("ppo", 6)]
    metrics = folder.metrics()
    assert [(row["stage"], row["step"]) for row in metrics] == events
    axis = [row["global_step"] for row in metrics]
    assert axis[:7] == [0, 5, 10, 15, 20, 22, 22]
    assert sorted(axis) == axis and len(set(axis)) == len(axis) - 1
    matrices = 2 * 3  # layers, q k v
    assert [(row["stage"], row["step"]) for row in folder.spectra()] == [
        e for e in events for _ in range(matrices)
    ]
    assert [(row["stage"], row["step"], row["shift"]) for row in folder.evals()] == [
        (*event, shift) for event in events for shift in ("none", "both")
    ]
    for row in metrics:
        assert {"id_accuracy", "id_n", "id_low", "id_high", "ood_accuracy", "ood_shift"} <= row.keys()
        assert {"seconds_training", "seconds_tracking", "seconds_evaluating", "seconds_kl"} <= row.keys()
    assert metrics[0]["kl_base_nats_per_token"] == pytest.approx(0, abs=1e-9)
    assert metrics[5]["kl_base_nats_per_token"] > 1e-4
    for name in ("seconds_training", "seconds_tracking", "seconds_evaluating", "seconds_wall"):
        column = [row[name] for row in metrics]
        assert sorted(column) == column
    assert all(len(row["outcomes"]) == row["n"] == 6 for row in folder.evals())


def test_files_of_a_run(finished: tuple[RunFolder, Result], model: Path) -> None:
    folder, result = finished
    settings = yaml.safe_load(folder.config_path.read_text())
    assert (
        settings["model"] == str(model)
        and settings["sft_steps"] == 22
        and settings["modules"] == ["q", "k", "v"]
    )
    assert folder.report_path.stat().st_size > 0
    for segment in ("sft", "ppo"):
        events = folder.tensorboard_dir / segment
        assert next(path.name for path in events.iterdir()).startswith("events.out.tfevents")
    assert not list((folder.path / "resume").rglob("*.pt"))
    checkpoint = folder.checkpoint_dir("ppo", 6)
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == len(make_tokenizer())
    base, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in (model, checkpoint))
    assert not torch.equal(base.lm_head.weight, tuned.lm_head.weight)
    assert "of the wall time" in result.stdout and str(folder.report_path) in result.stdout
    share = folder.summary()["tracking_share"]
    assert share == folder.metrics()[-1]["seconds_tracking"] / folder.metrics()[-1]["seconds_wall"]


def test_summary_pairs_the_outcomes(finished: tuple[RunFolder, Result]) -> None:
    folder, _ = finished
    outcomes = {
        (row["stage"], row["step"]): [bit == "1" for bit in row["outcomes"]]
        for row in folder.evals()
        if row["shift"] == "both"
    }
    test = folder.summary()["tests"]["sft_end_to_ppo_end"]["both"]
    wanted = mcnemar(outcomes["sft", 22], outcomes["ppo", 6])
    assert (test["gained"], test["lost"], test["p_value"]) == (wanted.gained, wanted.lost, wanted.p_value)


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


def test_ppo_from_an_sft_checkpoint(finished: tuple[RunFolder, Result], model: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    changes = {"ppo_from": 5, "sft_steps": 10, "ppo_updates": 1, "checkpoint_every": 1000}
    result = invoke(*arguments(model, folder.path, **changes))
    assert result.exit_code == 0, result.output
    rows = {(row["stage"], row["step"]): row for row in folder.metrics()}
    start, origin = rows["ppo", 0], rows["sft", 5]
    same = ("id_accuracy", "ood_accuracy", "kl_base_nats_per_token")
    assert [start[name] for name in same] == [origin[name] for name in same]
    assert start["global_step"] == origin["global_step"] == 5
    checkpoints = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    assert checkpoints == ["ppo-1", "sft-0", "sft-10", "sft-5"]
    spectra = {
        (row["stage"], row["step"]): row["delta_frobenius"]
        for row in folder.spectra()
        if row["name"] == folder.spectra()[0]["name"]
    }
    assert spectra["ppo", 0] == spectra["sft", 5] != spectra["sft", 10]
    assert set(folder.summary()["tests"]) == {
        "sft_peak_to_sft_end",
        "sft_peak_to_ppo_start",
        "sft_end_to_ppo_end",
        "ppo_start_to_ppo_end",
    }


def test_ppo_alone_and_further_shifts(model: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = tmp_path / "settings.yaml"
    config.write_text("stages: ppo\nshifts: [none, rule, both]\nppo-updates: 3\n")
    flags = {"ppo_updates": 1, "config": config, "engine": "exact"}
    assert invoke(*arguments(model, folder.path, **flags)).exit_code == 0
    rows = folder.metrics()
    assert [(row["stage"], row["step"]) for row in rows] == [("ppo", 0), ("ppo", 1)]
    assert rows[0]["global_step"] == 0 and "rule_accuracy" in rows[1] and rows[1]["ood_shift"] == "both"
    assert {row["engine"] for row in folder.spectra()} == {"exact"}
    assert set(folder.summary()["tests"]) == {"ppo_start_to_ppo_end"}


_ONE_STEP: dict[str, Any] = {
    "stages": "sft",
    "sft_steps": 1,
    "every": 1,
    "deals": 2,
    "turns": 1,
    "shifts": "none",
}
_FUSED = {
    "gpt_neox": lambda sizes: GPTNeoXConfig(**sizes, intermediate_size=24, max_position_embeddings=256),
    "bloom": lambda sizes: BloomConfig(**sizes),
    "falcon": lambda sizes: FalconConfig(**sizes, new_decoder_architecture=True, num_kv_heads=2),
    "falcon of one key": lambda sizes: FalconConfig(**sizes, multi_query=True),
}


def _queries(kind: str, fused: torch.Tensor) -> torch.Tensor:
    """The query rows of a query_key_value (rows, 16) of four heads of four, as each architecture orders them."""
    if kind == "falcon":
        return fused.view(2, 4, 4, 16)[:, :2]  # two groups: two queries, a key, a value
    if kind == "falcon of one key":
        return fused[:16]
    return fused.view(4, 3, 4, 16)[:, 0]


@pytest.mark.parametrize("kind", _FUSED)
def test_models_with_a_fused_query_key_value_are_tracked(kind: str, tmp_path: Path) -> None:
    """Only their config.json says how the heads lie in it; what moved is held against the saved weights."""
    tokenizer = make_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    for name in ("bos", "eos", "pad"):
        sizes[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(_FUSED[kind](sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = invoke(*arguments(folder, tmp_path / "run", **_ONE_STEP))
    assert result.exit_code == 0, result.output
    run = RunFolder(tmp_path / "run")
    before, after = (
        load_file(where / "model.safetensors") for where in (folder, run.checkpoint_dir("sft", 1))
    )
    (name,) = (name for name in before if name.endswith("query_key_value.weight"))
    change = _queries(kind, after[name].double()) - _queries(kind, before[name].double())
    (row,) = (row for row in run.spectra() if row["step"] == 1 and row["module"] == "q")
    assert change.norm() > 0
    assert row["delta_frobenius"] == pytest.approx(float(change.norm()), rel=1e-5)


def test_layers_that_are_not_tracked_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlspec.spectra.basis.partly_found", lambda *_: "only 1 of 2 layers hold q, k, v: 1")
    result = invoke(*arguments(model, tmp_path / "run", **_ONE_STEP))
    assert (
        "only 1 of 2 layers hold q, k, v: 1; the other layers are not tracked" in result.output.splitlines()
    )
