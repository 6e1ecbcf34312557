"""A run is a tree: branches of PPO, their own weights and rows, and runs from before there were branches."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file
from track_toys import arguments, assert_same_run, invoke, start_and_kill, stop_at

from rlspec.io.jsonl import append_rows, read_rows
from rlspec.jobs import track
from rlspec.jobs.track import _seconds_before
from rlspec.report.data import read_run
from rlspec.report.verdict import verdict
from rlspec.run.folder import RunFolder
from rlspec.run.segments import Segment, event_of

pytestmark = pytest.mark.usefixtures("cache")


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


def test_a_branch_is_held_near_the_weights_that_it_starts_from_also_when_it_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[dict[str, torch.Tensor]] = []
    train_ppo = track.train_ppo

    def watched(*args: Any, reference: Any, **kwargs: Any) -> Any:
        assert reference is not args[0] and not reference.training
        held.append({name: tensor.clone() for name, tensor in reference.state_dict().items()})
        return train_ppo(*args, reference=reference, **kwargs)

    monkeypatch.setattr(track, "train_ppo", watched)
    folder = RunFolder(tmp_path / "run")
    settings = {"advantages": "grpo", "group_size": 2, "ppo_kl_coef": 0.5, "ppo_clip": 0.2}
    stop_at(arguments(model, folder.path, **BRANCHES, **settings), "ppo-from-8", 1)
    assert invoke("track", "--resume", "--out", str(folder.path)).exit_code == 0
    assert len(held) == 3  # two branches, and the second again
    for found, step in zip(held, (5, 8, 8)):
        wanted = load_file(folder.checkpoint_dir("sft", step) / "model.safetensors")
        assert wanted.keys() <= found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
