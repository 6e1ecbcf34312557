"""The stage of `rlspec track` that restores: its rows, its weights to the bit, a kill inside it, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from track_toys import arguments, assert_same_run, invoke, start_and_kill, stop_at

from rlspec import restore_checkpoint
from rlspec.run.folder import RunFolder
from rlspec.run.segments import event_of

pytestmark = pytest.mark.usefixtures("cache")

STAGES = {"stages": "sft,restore", "sft_steps": 6, "restore_modules": "mlp", "restore_rank": "0.25"}


@pytest.fixture(scope="module")
def restored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "restored"
    result = invoke(*arguments(model, out, **STAGES))
    assert result.exit_code == 0, result.output
    assert "restored" in result.stdout and "end of SFT -> restored, shift both" in result.stdout
    return RunFolder(out)


def test_the_weights_are_those_of_the_command(restored: RunFolder, model: Path, tmp_path: Path) -> None:
    tuned = restored.checkpoint_dir("sft", 6)
    restore_checkpoint(model, tuned, tmp_path / "out", modules="mlp", rank=0.25)
    found = load_file(restored.checkpoint_dir("restore", 1) / "model.safetensors")
    wanted = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tuned / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {name for name in found if not torch.equal(found[name], before[name])} == {
        name for name in found if "mlp" in name
    }


def test_its_rows_follow_those_of_the_end_of_sft(restored: RunFolder) -> None:
    rows = {event_of(row): row for row in restored.metrics()}
    start, end, origin = rows["restore", 0], rows["restore", 1], rows["sft", 6]
    assert list(rows)[-2:] == [("restore", 0), ("restore", 1)]
    assert (start["parent_segment"], start["parent_step"], start["parent_weights"]) == (
        "sft",
        6,
        origin["weights"],
    )
    # No optimizer step is taken, and of the matrices tracked none is restored.
    assert start["global_step"] == end["global_step"] == origin["global_step"] == 6
    assert start["kl_base_nats_per_token"] == origin["kl_base_nats_per_token"]
    assert 0 < end["kl_base_nats_per_token"] != origin["kl_base_nats_per_token"]
    columns = ("angle_left_mean_rad", "sigma_change_rel_max", "delta_frobenius")
    turned, before = (
        [[row[name] for name in columns] for row in restored.spectra() if event_of(row) == event]
        for event in (("restore", 1), ("sft", 6))
    )
    assert turned == before
    assert set(restored.summary()["tests"]["sft_end_to_restore_end"]) == {"none", "both"}


@pytest.mark.parametrize("step", [0, 1])
def test_killed_inside_it_the_run_ends_the_same(
    restored: RunFolder, model: Path, tmp_path: Path, step: int
) -> None:
    folder = RunFolder(tmp_path / "run")
    start_and_kill(arguments(model, folder.path, **STAGES), folder, "restore", step)
    assert invoke("track", "--resume", "--out", str(folder.path)).exit_code == 0
    assert_same_run(folder, restored)


def test_a_signal_stops_it_before_the_weights_change(
    restored: RunFolder, model: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    stop_at(arguments(model, folder.path, **STAGES), "restore", 0)
    assert event_of(folder.metrics()[-1]) == ("restore", 0)
    assert invoke("track", "--resume", "--out", str(folder.path)).exit_code == 0
    assert_same_run(folder, restored)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"restore_modules": "mpl"}, "mpl"),
        ({"restore_rank": "1.5"}, "1.5"),
        ({"stages": "ppo,restore"}, "restore needs sft"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    model: Path, tmp_path: Path, changes: dict[str, str], told: str
) -> None:
    result = invoke(*arguments(model, tmp_path / "run", **{**STAGES, **changes}))
    assert result.exit_code == 2 and told in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
