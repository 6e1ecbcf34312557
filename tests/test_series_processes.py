"""Several processes measure a series together: the bytes of one, and what happens when one of them is killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from restore_toys import save_model, tune
from safetensors.torch import load_file, save_file

import rlspec
from rlspec.cli.main import main
from rlspec.errors import OptionError, RunFolderError
from rlspec.io import launch
from rlspec.io.lock import is_held, locked
from rlspec.io.share import Share
from rlspec.jobs.series import job as jobs
from rlspec.jobs.series import parts, table
from rlspec.jobs.series.parts import launch_file
from rlspec.spectra.processes import ProcessError

pytestmark = pytest.mark.usefixtures("own_cache")
OPTIONS: dict[str, Any] = {"modules": "q,k,v,o,mlp", "rank": 0.2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base beside a folder with two checkpoints of it, and what one process makes of them."""
    save_model(tmp_path / "base", "llama")
    for step in (1, 2):
        tune(tmp_path / "base", tmp_path / "run" / f"checkpoint-{step}", size=0.01 * step, seed=step)
    rlspec.measure(tmp_path / "base", tmp_path / "run", out=tmp_path / "alone", **OPTIONS)
    return tmp_path / "run"


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


_KILLED = """
import os, signal, sys
from rlspec.io import launch
from rlspec.jobs.series import job
launch.APART = job.APART = float(os.environ["APART"])
right, calls = job.Job._rows, []
def killed(self, *args):
    calls.append(1)
    if self.share.number == 1 and len(calls) == int(os.environ.get("KILL_AT", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return right(self, *args)
job.Job._rows = killed
from rlspec.cli.main import main
main(sys.argv[1:])
"""


def start(
    number: int,
    count: int,
    run: Path,
    out: Path,
    kill_at: int = 0,
    apart: float = 60.0,
    locking: bool = False,
) -> subprocess.Popen[str]:
    told = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number, "KILL_AT": kill_at, "APART": apart}
    # As many threads as the one process has: sums of products depend on them.
    told |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), torch.get_num_threads())
    command = [sys.executable, "-c", _KILLED, "measure", run, "--base", run.parent / "base", "--out", out]
    return subprocess.Popen(
        [*map(str, command), "--modules", OPTIONS["modules"], *(["--locking"] if locking else [])],
        env=os.environ | {name: str(value) for name, value in told.items()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    said = [process.communicate(timeout=90) for process in processes]
    return [(process.returncode, *one) for process, one in zip(processes, said, strict=True)]


def test_several_processes_write_the_bytes_of_one(run: Path) -> None:
    out = run.parent / "together"
    first, second, third = ended([start(number, 3, run, out) for number in range(3)])
    assert [code for code, _, _ in (first, second, third)] == [0, 0, 0], first[2] + second[2] + third[2]
    assert "checkpoint-2" in first[1] and second[1] == third[1] == ""
    assert contents(out) == contents(run.parent / "alone")


def test_a_killed_process_is_told_of_and_the_same_command_goes_on(run: Path) -> None:
    out = run.parent / "killed"
    (code, _, told), (killed, _, _) = ended([start(number, 2, run, out, kill_at=2) for number in range(2)])
    assert killed == -9 and code == 2
    assert "process 1 (" in told and "the same command goes on" in told and "Traceback" not in told
    left = (out / "spectra.jsonl").read_bytes().splitlines()
    whole = (run.parent / "alone" / "spectra.jsonl").read_bytes().splitlines()
    assert len(whole) / 2 < len(left) < len(whole) and set(left) < set(whole)
    assert [one[0] for one in ended([start(number, 2, run, out) for number in range(2)])] == [0, 0]
    assert contents(out) == contents(run.parent / "alone")


def in_part(run: Path, out: Path, number: int, count: int) -> None:
    """What process ``number`` leaves where the first one is killed once both have begun."""
    job = jobs.Job.open(
        run.parent / "base", out=out, engine="delta", null_draws=0, device="cpu", memory_gib=4, **OPTIONS
    )
    job.table.add([(c, c.files()) for c in jobs.find_checkpoints([run])])
    job.table.close()
    rlspec.measure(run.parent / "base", run, out=out, share=Share(number, count), **OPTIONS)


def test_one_process_goes_on_with_the_parts_of_several(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run.parent / "parts"
    in_part(run, out, 2, 3)
    left = (out / "spectra.part-2.jsonl").read_bytes()
    assert left and not (out / "spectra.jsonl").exists()
    (out / "spectra.part-2.jsonl").write_bytes(left + b'{"cut off')
    measured = []
    right = jobs.Job._rows
    monkeypatch.setattr(
        jobs.Job, "_rows", lambda self, *args: measured.append(rows := right(self, *args)) or rows
    )
    rlspec.measure(run.parent / "base", run, out=out, **OPTIONS)
    names = {row["name"] for rows in measured for row in rows}
    assert names and not any(name.encode() in left for name in names)
    assert contents(out) == contents(run.parent / "alone")


def test_a_part_that_another_process_writes_is_left_to_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run.parent / "held"
    in_part(run, out, 1, 2)
    monkeypatch.setattr(parts, "APART", 0.0)
    with (out / "spectra.part-1.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = contents(out)
        with pytest.raises(RunFolderError, match="in use by another rlspec process"):
            rlspec.measure(run.parent / "base", run, out=out, **OPTIONS)
        with pytest.raises(RunFolderError, match=r"spectra\.part-1\.jsonl is in use by another"):
            rlspec.measure(run.parent / "base", run, out=out, share=Share(1, 2), **OPTIONS)
        assert contents(out) == before


def test_a_process_that_never_comes_is_not_waited_for_in_vain(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "APART", 0.0)
    monkeypatch.setattr(table, "APART", 0.0)
    with pytest.raises(ProcessError, match=r"process 1 \(\d+ rows\)"):
        rlspec.measure(run.parent / "base", run, out=run.parent / "first", share=Share(0, 2), **OPTIONS)
    with pytest.raises(RunFolderError, match="process 0 of 2 has not entered the checkpoints"):
        rlspec.measure(run.parent / "base", run, out=run.parent / "second", share=Share(1, 2), **OPTIONS)


def test_all_processes_call_a_checkpoint_as_the_first_one_does(run: Path) -> None:
    """Which knows labels that the table had already: here those of another run's checkpoints of the same names."""
    out, other = run.parent / "alone", run.parent / "other"
    shutil.copytree(run, other)
    done = ended([start(number, 2, other, out) for number in range(2)])
    assert [code for code, *_ in done] == [0, 0], done
    names = {json.loads(line)["checkpoint"] for line in (out / "spectra.jsonl").open()}
    assert names == {"checkpoint-1", "checkpoint-2", "other/checkpoint-1", "other/checkpoint-2"}


def test_processes_without_a_folder_and_broken_launches_are_refused(run: Path) -> None:
    with pytest.raises(OptionError, match="out=None: 2 processes need a folder"):
        rlspec.measure(run.parent / "base", run, share=Share(0, 2))
    assert Share.of_launch({}) == Share() and Share.of_launch({"RANK": "3", "WORLD_SIZE": "4"}) == Share(3, 4)
    for broken in ({"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "4"}):
        with pytest.raises(OptionError, match="no launch"):
            Share.of_launch(broken)


def command(number: int, run: Path, *more: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    """One of two processes of the command, in this one."""
    for name, value in (("RANK", number), ("LOCAL_RANK", number), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(launch, "APART", 0.1)
    words = ["measure", str(run), "--base", str(run.parent / "base"), "--out", str(run.parent / "out"), *more]
    return CliRunner().invoke(main, words)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--base", "nowhere"), "nowhere"),
        (("--rank", "7.5"), "rank"),
        (("nowhere",), "nowhere"),
        (("--watch",), "is for one process"),
        (("--alarm", "ood"), "no such score"),
        (("--texts", "nowhere"), "no such file"),
        (("--nonsense",), "No such option"),
    ],
)
def test_what_all_refuse_is_told_once(
    more: tuple[str, ...], told: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (command(number, run, *more, monkeypatch=monkeypatch) for number in range(2))
    assert first.exit_code == second.exit_code == 2
    assert told in first.stderr and "Traceback" not in first.stderr and first.stdout == ""
    assert second.output == ""


def test_a_checkpoint_that_all_refuse_once_the_first_has_the_folder_is_told_once(run: Path) -> None:
    (file,) = (run / "checkpoint-2").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    save_file(tensors | {name: tensors[name][1:].clone()}, file, metadata={"format": "pt"})
    out = run.parent / "refused"
    (code, said, told), *others = ended([start(number, 3, run, out, apart=3.0) for number in range(2)])
    assert code == 2 and said == "" and told.count("\n") == 1 and "is that its base?" in told
    assert others == [(2, "", "")]
    assert not launch_file(out).exists()


def test_what_one_process_refuses_alone_it_tells(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not see the inputs, say."""
    (run.parent / "out").mkdir()
    with locked(launch_file(run.parent / "out"), b""):  # as the first one does that goes on
        second = command(1, run, "nowhere", monkeypatch=monkeypatch)
    assert second.exit_code == 2 and second.stderr.startswith("Error: process 1 of 2: ")
    assert "nowhere" in second.stderr and second.stderr.count("\n") == 1


def test_the_first_process_holds_the_launch_from_when_on_it_refuses_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run.parent / "first"
    out.mkdir()
    launch_file(out).write_bytes(b"")  # of a launch that was killed
    seen = []
    for name in ("_checked", "_rows"):
        right = getattr(jobs.Job, name)

        def looked(self: Any, *args: Any, name: str = name, right: Any = right) -> Any:
            seen.append((name, is_held(launch_file(out))))
            return right(self, *args)

        monkeypatch.setattr(jobs.Job, name, looked)
    monkeypatch.setattr(jobs, "APART", 0.0)
    with pytest.raises(ProcessError):
        rlspec.measure(run.parent / "base", run, out=out, share=Share(0, 2), **OPTIONS)
    assert set(seen) == {("_checked", False), ("_rows", True)} and not launch_file(out).exists()
    rlspec.measure(run.parent / "base", run, out=out, **OPTIONS)
    assert contents(out) == contents(run.parent / "alone")


def test_a_stop_is_told_of_by_the_first_process_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Any, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.Job, "measure", stopped)
    first, second = (command(number, run, monkeypatch=monkeypatch) for number in range(2))
    assert first.exit_code == second.exit_code == 130
    assert first.stderr.startswith("Stopped; what is measured is kept") and second.stderr == ""
