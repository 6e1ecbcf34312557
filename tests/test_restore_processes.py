"""Several processes restore a checkpoint together: the bytes of one, and what happens when one of them fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from restore_process_toys import FLAGS, OPTIONS, together
from restore_toys import bytes_of, pair
from safetensors.torch import load_file, save_file

from rlspec import restore_checkpoint
from rlspec.cli.main import main
from rlspec.errors import CheckpointError, TensorError
from rlspec.io import launch
from rlspec.io.launch import ChangedInputsError, FirstMissingError, JoinedStaging, ToldByFirstError
from rlspec.io.share import Share
from rlspec.io.staging import Staging
from rlspec.restore import RestoreOptions
from rlspec.restore.dealt import shard_owners
from rlspec.restore.plan import plan_restore

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a tuned checkpoint of some shards, and beside them what one process makes of those."""
    folder = tmp_path_factory.mktemp("inputs")
    base, tuned = pair(folder, dtype=torch.bfloat16, shard="40KB")
    assert len(list(base.glob("*.safetensors"))) >= 4
    restore_checkpoint(base, tuned, folder / "alone", cache_dir=folder / "cache", **OPTIONS)
    return base, tuned


def alone(checkpoints: tuple[Path, Path]) -> dict[str, bytes]:
    return bytes_of(checkpoints[0].parent / "alone")


def left(folder: Path) -> set[str]:
    """What lies there beside decompositions and what the processes printed."""
    return {p.name for p in folder.iterdir() if not p.name.startswith("said-")} - {"cache"}


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_write_the_bytes_of_one(
    count: int, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    first, *others = together(count, checkpoints, out, "--report", str(file))
    assert [one.code for one in (first, *others)] == [0] * count, [first, *others]
    assert all(one.out == one.err == "" for one in others)
    assert "restored 6 matrices" in first.out and first.err == ""
    assert bytes_of(out) == alone(checkpoints)
    report = json.loads(file.read_text())
    truth = restore_checkpoint(*checkpoints, tmp_path / "again", **OPTIONS)
    assert report["matrices"] == json.loads(json.dumps(truth.to_dict()))["matrices"]
    assert report["resumed"] == 0
    assert left(tmp_path) == {"out", "report.json", "again"}


@pytest.mark.parametrize(
    ("count", "of_first", "then"), [(2, False, 1), (4, False, 3), (2, True, 2), (4, True, 1)]
)
def test_after_a_kill_any_number_of_processes_finishes(
    count: int, of_first: bool, then: int, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    plan = plan_restore(*checkpoints, RestoreOptions(**OPTIONS))
    owners = shard_owners(plan, count)
    killed = 0 if of_first else max(owners[step.entry.shard] for step in plan.chosen("restore"))
    assert (killed == 0) == of_first
    all_ended = together(count, checkpoints, out, kill={killed: 1 + (count == 2)}, apart=8.0)
    assert all_ended[killed].code == -signal.SIGKILL and not out.exists()
    if killed:
        first = all_ended[0]
        assert first.code == 2 and first.err.count("\n") == 1 and first.out == ""
        assert f"process {killed} (" in first.err
        assert "what is finished is kept, the same command with --resume goes on" in first.err
        assert all(one.code == 0 and one.err == "" for i, one in enumerate(all_ended) if i not in (0, killed))
    for one in all_ended[1:] if not killed else []:  # those that were not done by then, or came too late
        assert one.code == 0 or (one.code == 2 and "process 0 of" in one.err and one.err.count("\n") == 1), (
            one
        )
    again = together(then, checkpoints, out, "--resume", "--report", str(file))
    assert [one.code for one in again] == [0] * then, again
    assert bytes_of(out) == alone(checkpoints)
    report = json.loads(file.read_text())
    assert len(report["matrices"]) == 6 and (report["resumed"] > 0 or of_first or count == 4)
    assert left(tmp_path) == {"out", "report.json"}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--strength", "2"), "not in [0, 1]"),
        (("--layers", "7"), "the model has 2 layers"),
        (("--memory-gib", "0.001"), "is too little"),
        (("--nonsense",), "No such option"),
    ],
)
def test_what_all_refuse_is_told_once(
    more: tuple[str, ...], told: str, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first, *others = together(3, checkpoints, tmp_path / "out", *more, apart=0.5)
    assert first.code == 2 and told in first.err
    assert [one.code for one in others] == [2, 2] and all(one.out == one.err == "" for one in others)
    assert left(tmp_path) == set()


def test_a_first_process_that_never_comes_is_told_of(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "APART", 0.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["restore", "--base", str(checkpoints[0]), "--tuned", str(checkpoints[1])]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "out"), *FLAGS])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "process 0 of 2 has not begun to write it" in result.stderr and "--resume" not in result.stderr


def test_what_one_process_refuses_alone_it_tells(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """A machine that does not see the inputs, say."""
    changed = {1: ["--base", str(tmp_path / "nowhere")]}
    first, second = together(2, checkpoints, tmp_path / "out", apart=5.0, changed=changed)
    assert second.code == 2 and second.err.startswith("Error: process 1 of 2: ") and "nowhere" in second.err
    assert first.code == 2 and "process 1 (" in first.err
    first, second = together(2, checkpoints, tmp_path / "other", apart=5.0, changed={1: ["--seed", "3"]})
    assert second.code == 2 and "process 0 has other inputs or settings than process 1 of 2" in second.err


@pytest.mark.parametrize("layer", [0, 1])
def test_values_at_fault_are_told_once_and_leave_nothing(
    layer: int, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    name = f"model.layers.{layer}.self_attn.q_proj.weight"
    checkpoints = (checkpoints[0], shutil.copytree(checkpoints[1], tmp_path / "tuned"))
    (shard,) = (path for path in checkpoints[1].glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    owners = shard_owners(plan_restore(*checkpoints, RestoreOptions(**OPTIONS)), 2)
    first, second = together(2, checkpoints, tmp_path / "out")
    assert first.code == 2 and f"{shard}: {name}" in first.err and first.err.count("\n") == 1
    # On a busy machine the second may come when the first has told of its own values, and gone.
    late = owners[shard] == 0 and "has not begun to write it" in second.err
    assert (second.err == "" or late) and second.code in ((0, 2) if owners[shard] == 0 else (2,))
    assert left(tmp_path) == {"tuned"}


def test_shards_are_dealt_alike_whatever_is_finished(checkpoints: tuple[Path, Path]) -> None:
    plan = plan_restore(*checkpoints, RestoreOptions(**OPTIONS))
    for count in (1, 2, 4):
        owners = shard_owners(plan, count)
        assert set(owners) == set(checkpoints[1].glob("*.safetensors"))
        assert set(owners.values()) == set(range(count))


def test_a_process_without_shards_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(tmp_path)
    restore_checkpoint(base, tuned, tmp_path / "alone")
    idle = restore_checkpoint(base, tuned, tmp_path / "out", share=Share(1, 2))
    assert idle.matrices == () and left(tmp_path) == {"base", "tuned", "alone"}
    restore_checkpoint(base, tuned, tmp_path / "out", share=Share(0, 2))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    command = ["restore", "--base", str(base), "--tuned", str(tuned), "--out", str(tmp_path / "third")]
    result = CliRunner().invoke(main, command)
    assert (
        result.exit_code == 0
        and "2 of the 3 processes have nothing to do: shards written: 1" in result.stderr
    )


def test_the_launch_of_a_dead_process_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "APART", 0.0)
    first = Staging(tmp_path / "out", "f", resume=False, overwrite=False)
    with pytest.raises(FirstMissingError, match="process 0 of 2 has not begun"):
        JoinedStaging(tmp_path / "out", "f", Share(1, 2))
    first.invite(2, {"a": 0, "b": 1})
    for fingerprint, share in (("g", Share(1, 2)), ("f", Share(1, 3))):
        with pytest.raises(CheckpointError, match="give all the same command"):
            JoinedStaging(tmp_path / "out", fingerprint, share)
    second = JoinedStaging(tmp_path / "out", "f", Share(1, 2))
    second.look()
    with pytest.raises(CheckpointError, match="another process 1 is writing it"):
        JoinedStaging(tmp_path / "out", "f", Share(1, 2))
    dead = first.folder / "launch"
    content = dead.read_bytes()
    first.close()  # which is told the other ...
    with pytest.raises(ToldByFirstError):
        second.look()
    second.close()
    first.folder.mkdir(exist_ok=True)
    dead.write_bytes(content)  # ... where a kill leaves the file
    with pytest.raises(FirstMissingError):
        JoinedStaging(tmp_path / "out", "f", Share(1, 2))


@pytest.mark.parametrize("emptied", [True, False])
def test_who_comes_as_the_first_process_goes_leaves_nothing(
    emptied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It enters between what the first one looks at and what that removes."""
    first = Staging(tmp_path / "out", "f", resume=False, overwrite=False)
    first.invite(2, {"a": 0, "b": 1})
    right = launch.locked

    def late(path: Path, content: bytes) -> object:
        first.close(keep=False)
        if not emptied:
            first.folder.mkdir()  # its last call comes after ours
        return right(path, content)

    monkeypatch.setattr(launch, "locked", late)
    with pytest.raises(ToldByFirstError, match="process 0 of 2 has stopped"):
        second = JoinedStaging(tmp_path / "out", "f", Share(1, 2))
        try:
            second.look()
        finally:
            second.close()
    assert left(tmp_path) == set()


def test_a_folder_that_a_process_of_a_launch_still_writes_to_is_left_to_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = Staging(out, "f", resume=False, overwrite=False)
    first.invite(2, {"a": 0, "b": 1})
    second = JoinedStaging(out, "f", Share(1, 2))
    (second.checkpoint / "b").write_bytes(b"12")
    second.finish("b", 2)
    launch_file = first.folder / "launch"
    held = launch_file.open("rb")
    first.unlock()  # as a kill does
    first._launch._lock.close()  # type: ignore[union-attr]
    held.close()
    with pytest.raises(CheckpointError, match="process 0 of 2 has ended"):
        second.look()
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="another process is writing it"):
            Staging(out, "f", resume=resume, overwrite=False)
    assert (second.checkpoint / "b").read_bytes() == b"12"
    second.close()
    again = Staging(out, "f", resume=True, overwrite=False)
    assert again.finished == {"b": 2}
    assert {path.name for path in again.folder.iterdir()} == {"checkpoint", "state.json"}
    again.close()


def test_without_locks_a_dead_launch_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can know that it is dead but the user."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", none)
        first = Staging(out, "f", resume=False, overwrite=False)
        first.invite(2, {"a": 0, "b": 1})
        JoinedStaging(out, "f", Share(1, 2)).finish("b", 2)
        (first.checkpoint / "a").write_bytes(b"1")
        first.finish("a", 1)  # and a kill here
        with pytest.raises(CheckpointError, match="no locks that would tell") as caught:
            Staging(out, "f", resume=True, overwrite=False)
        assert f"if none is, remove launch, process-1.jsonl in {first.folder}" in str(caught.value)
        for name in ("launch", "process-1.jsonl"):
            (first.folder / name).unlink()
        again = Staging(out, "f", resume=True, overwrite=False)
        assert again.finished == {"a": 1}
        again.close(keep=False)
    assert left(tmp_path) == set()


def test_what_a_process_fails_with_reaches_the_first(tmp_path: Path) -> None:
    first = Staging(tmp_path / "out", "f", resume=False, overwrite=False)
    first.invite(3, {"a": 0, "b": 1, "c": 2})
    second, third = (JoinedStaging(tmp_path / "out", "f", Share(number, 3)) for number in (1, 2))
    first.look()
    with pytest.raises(ToldByFirstError):
        third.fail(CheckpointError("/there: cannot be written: no space left"))
    with pytest.raises(CheckpointError, match="^process 2 of 3: /there: cannot be written: no space left$"):
        first.wait()
    with pytest.raises(ToldByFirstError):
        second.fail(TensorError("q: 3 values are NaN"))
    with pytest.raises(TensorError, match="^q: 3 values are NaN$"):
        first.look()
    for staging in (second, third, first):
        staging.close()
    assert left(tmp_path) == set()


def test_that_inputs_have_changed_reaches_the_first_as_such(tmp_path: Path) -> None:
    """It removes what is finished then."""
    first = Staging(tmp_path / "out", "f", resume=False, overwrite=False)
    first.invite(2, {"a": 0, "b": 1})
    second = JoinedStaging(tmp_path / "out", "f", Share(1, 2))
    with pytest.raises(ToldByFirstError):
        second.fail(ChangedInputsError("base was written to"))
    with pytest.raises(ChangedInputsError, match="^base was written to$"):
        first.look()
    for staging in (second, first):
        staging.close()


def test_torchrun_starts_them(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rlspec", "restore", "--base", str(checkpoints[0]), "--tuned", str(checkpoints[1])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), *FLAGS],
        env=os.environ | threads,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("restored 6 matrices") == 1
    assert bytes_of(tmp_path / "out") == alone(checkpoints)
