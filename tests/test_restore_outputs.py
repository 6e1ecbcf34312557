"""Where a restored checkpoint goes: nothing that is there already is harmed, and nothing half-done is left there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from restore_toys import bytes_of, pair
from safetensors.torch import load_file, save_file

import rlspec
from rlspec.errors import CheckpointError, TensorError
from rlspec.io.writer import _Shard
from rlspec.restore import RestoreOptions
from rlspec.restore.checkpoint import run_plan
from rlspec.restore.plan import Step, plan_restore
from rlspec.restore.target import Target


@pytest.mark.parametrize("mode", ["directions", "copy"])
def test_values_that_cannot_be_restored_leave_nothing_behind(mode: str, tmp_path: Path) -> None:
    """Also with a shard finished: the same inputs would fail again, and a resumed run takes no others."""
    base, tuned = pair(tmp_path, shard="60KB")
    last = max(p for p in tuned.glob("*.safetensors") if any("k_proj" in n for n in load_file(p)))
    found = load_file(last)
    next(t for n, t in found.items() if "k_proj" in n)[0, 0] = torch.nan
    save_file(found, last, metadata={"format": "pt"})
    for resume in (False, True):
        with pytest.raises(TensorError, match=r"k_proj.*1 of \d+ values are NaN"):
            rlspec.restore_checkpoint(base, tuned, tmp_path / "out", mode=mode, resume=resume)
        assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


def test_an_output_never_takes_the_place_of_weights_that_are_linked(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    store = tmp_path / "store"
    tuned.rename(store)
    tuned.mkdir()
    (tuned / "model.safetensors").symlink_to(store / "model.safetensors")
    before = bytes_of(store)
    with pytest.raises(CheckpointError, match=r"store holds .*to which .*tuned/model.safetensors links"):
        rlspec.restore_checkpoint(base, tuned, store, overwrite=True)
    assert bytes_of(store) == before
    rlspec.restore_checkpoint(base, tuned, tmp_path / "out")
    rlspec.restore_checkpoint(base, store, tmp_path / "plain")
    assert (
        bytes_of(tmp_path / "out")["model.safetensors"] == bytes_of(tmp_path / "plain")["model.safetensors"]
    )


def test_outputs_that_would_harm_are_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    (tmp_path / "link").symlink_to(tuned)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for out, named in (
        (base, "holds or lies in the base"),
        (tuned / "inside", "lies in the tuned"),
        (tmp_path, "holds or lies in the base"),
        (tmp_path / "link", "holds or lies in the tuned"),
        (tmp_path / "notes", "is not a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=named):
            rlspec.restore_checkpoint(base, tuned, out, overwrite=True)
    with pytest.raises(CheckpointError, match="notes exists already; give overwrite=True"):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "notes")
    out = tmp_path / "out"
    rlspec.restore_checkpoint(base, tuned, out, modules="k")
    first = bytes_of(out)
    with pytest.raises(CheckpointError, match="it is complete, nothing is left to resume"):
        rlspec.restore_checkpoint(base, tuned, out, resume=True)
    rlspec.restore_checkpoint(base, tuned, out, modules="v", overwrite=True)
    assert bytes_of(out).keys() == first.keys() and bytes_of(out) != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "link", "notes", "out", "tuned"]


@pytest.mark.parametrize(
    "mine", ["photos/beach.json", "thesis.pdf", ".git/HEAD", "notes.txt", "results.json", "other.safetensors"]
)
def test_overwriting_a_checkpoint_deletes_nothing_that_is_no_part_of_one(tmp_path: Path, mine: str) -> None:
    base, tuned = pair(tmp_path)
    out = tmp_path / "out"
    rlspec.restore_checkpoint(base, tuned, out)
    work = out / mine
    work.parent.mkdir(exist_ok=True)
    work.write_text("years of work")
    before = bytes_of(out)
    with pytest.raises(CheckpointError, match=f"also holds {mine}, which is no part"):
        rlspec.restore_checkpoint(base, tuned, out, modules="v", overwrite=True)
    assert bytes_of(out) == before and work.read_text() == "years of work"
    # What an input holds too, the output has again.
    held = tuned / mine
    held.parent.mkdir(exist_ok=True)
    held.write_text("part of the model")
    with pytest.raises(CheckpointError, match=f"also holds {mine}, which is no part"):
        rlspec.restore_checkpoint(base, tuned, out, modules="v", overwrite=True)
    held.write_text("years of work")
    rlspec.restore_checkpoint(base, tuned, out, modules="v", overwrite=True)


def test_only_what_is_a_checkpoint_for_certain_is_overwritten(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file({"mine": torch.ones(2)}, weights / "mine.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"not read by anyone")
    for folder in (weights, broken):
        before = bytes_of(folder)
        with pytest.raises(CheckpointError, match=f"{folder.name} is not a checkpoint; .*replaces checkp"):
            rlspec.restore_checkpoint(base, tuned, folder, overwrite=True)
        assert bytes_of(folder) == before


@pytest.mark.parametrize("disk", ["quick", "slow"])
def test_what_appears_in_the_old_output_meanwhile_is_kept(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair(tmp_path)
    out = tmp_path / "out"
    rlspec.restore_checkpoint(base, tuned, out)
    plan = plan_restore(base, tuned, RestoreOptions(modules="v"))
    target = Target(out, base, tuned, overwrite=True)

    def come(step: Step) -> None:
        (out / "thesis.txt").write_text("years of work")

    computed = threading.Event()
    if disk == "slow":
        copy = _Shard.copy

        def late(shard: _Shard) -> None:
            computed.wait(60)
            shard._stop.wait(0.2)  # no copy begins once it is told to stop
            copy(shard)

        monkeypatch.setattr(_Shard, "copy", late)
    with pytest.raises(CheckpointError, match=r"also holds thesis\.txt"):
        run_plan(plan, target, on_step=come, on_commit=computed.set)
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").rename(tmp_path / "thesis.txt")
    report = run_plan(plan, Target(out, base, tuned, overwrite=True, resume=True))
    assert report.resumed == 2


def test_weights_that_are_not_copied_are_told(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    (tuned / "spk_dict.pt").write_bytes(b"voices")
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out")
    assert [note for note in report.notes if "spk_dict.pt, which look like other weights" in note]
    assert not (tmp_path / "out" / "spk_dict.pt").exists()


def swap(one: Path, other: Path) -> None:
    """Two files trade places, as where a training writes its next checkpoint over the one that is read."""
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def watched(tmp_path: Path, which: str) -> tuple[Path, Path, Path, Path]:
    """A base, a tuned checkpoint, one of its files or of the base's, and another version of that file."""
    base, tuned = pair(tmp_path, shard="60KB")
    file = max(({"base": base, "tuned": tuned}[which]).glob("*.safetensors"))
    found = {name: tensor + 0.25 for name, tensor in load_file(file).items()}
    save_file(found, tmp_path / "newer", metadata={"format": "pt"})
    os.utime(tmp_path / "newer", (2e9, 2e9))
    return base, tuned, file, tmp_path / "newer"


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_inputs_that_change_while_they_are_read_give_no_mixture(which: str, tmp_path: Path) -> None:
    base, tuned, file, newer = watched(tmp_path, which)
    out = tmp_path / "out"
    plan, target = plan_restore(base, tuned, RestoreOptions()), Target(out, base, tuned)
    with pytest.raises(CheckpointError, match=rf"{tuned} was written to while it was read: .*begin anew"):
        run_plan(plan, target, on_begin=lambda steps: swap(file, newer))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "newer"}
    run_plan(plan_restore(base, tuned, RestoreOptions()), target)


def test_an_input_that_is_away_for_a_while_costs_no_work(tmp_path: Path) -> None:
    """As on a disk that is not there for a moment; what is finished is taken over when it is back."""
    base, tuned, file, _ = watched(tmp_path, "tuned")
    out = tmp_path / "out"
    plan = plan_restore(base, tuned, RestoreOptions())
    with pytest.raises(CheckpointError, match=f"{file}: cannot be read"):
        run_plan(plan, Target(out, base, tuned), on_commit=lambda: file.rename(tmp_path / "away"))
    (tmp_path / "away").rename(file)
    report = run_plan(plan, Target(out, base, tuned, resume=True))
    assert report.resumed > 0
