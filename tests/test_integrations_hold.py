"""One folder, one training: what another one does to it is told, and mixes nothing."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from integration_toys import plain_trainer
from train_toys import toy_model

from rlspec.errors import RunFolderError
from rlspec.integrations.hold import Hold
from rlspec.integrations.transformers import SpectralCallback
from rlspec.io.lock import let_go, take_lock

pytestmark = pytest.mark.usefixtures("own_cache")
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


def test_a_folder_that_meanwhile_holds_another_training_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    plain_trainer(tmp_path / "a", [SpectralCallback(1, out=out)], max_steps=2, **SAVING).train()
    other = toy_model(seed=7)
    plain_trainer(tmp_path / "b", [SpectralCallback(1, out=out)], other, max_steps=3).train()
    rows = (out / "spectra.jsonl").read_bytes()
    resumed = SpectralCallback(1, out=out)
    trainer = plain_trainer(tmp_path / "a", [resumed], **SAVING)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert trainer.state.global_step == 4 and resumed.records == []
    assert resumed.disabled is not None
    assert resumed.disabled.startswith(f"{out} holds another training than the one that is resumed at step 2")
    assert (out / "spectra.jsonl").read_bytes() == rows
    assert sum("tracking of the spectra ends here" in r.message for r in caplog.records) == 1


def test_a_checkpoint_of_a_resumed_training_still_belongs_to_it(tmp_path: Path) -> None:
    for last, first in ((2, None), (4, 2), (6, 4)):
        callback = SpectralCallback(2, out=tmp_path / "out")
        trainer = plain_trainer(tmp_path / "t", [callback], max_steps=last, **SAVING)
        trainer.train(resume_from_checkpoint=first and str(tmp_path / "t" / f"checkpoint-{first}"))
        assert callback.disabled is None
    assert [record.step for record in callback.records] == [0, 2, 4, 6]


def test_a_folder_that_another_process_writes_to_is_refused_and_free_again_after_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import sys; from pathlib import Path; from rlspec.io.lock import take_lock; "
        f"lock = take_lock(Path({str(out)!r})); print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        callback = SpectralCallback(1, out=out)
        trainer = plain_trainer(tmp_path / "t", [callback])
        trainer.train()
        assert other.stdin is not None
        other.stdin.close()
    assert callback.disabled is not None and trainer.state.global_step == 4
    assert callback.disabled.startswith(f"{out} is in use by another training")
    assert callback.disabled.endswith("choose another out=")
    assert [path.name for path in out.iterdir()] == [".lock"]
    trainer.train()
    assert callback.disabled is None and len(callback.records) == 5
    take_lock(out).close()  # let go of at the end


def test_whoever_comes_last_in_one_process_has_the_folder(tmp_path: Path) -> None:
    """Else a training that was interrupted would keep it for ever."""
    first = Hold(tmp_path)
    second = Hold(tmp_path)
    with pytest.raises(RunFolderError, match="a later training of this process"):
        first.check()
    first.release()
    second.check()
    with pytest.raises(RunFolderError, match="in use"):
        take_lock(tmp_path)


@contextmanager
def forked(work: Callable[[], object] = bool) -> Iterator[None]:
    """Context with a child that has all open that this process has, as a worker of a DataLoader; it does ``work``."""
    (ready, tell), (wait, leave) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(tell, b"1")
            os.close(leave)
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(tell)
    os.read(ready, 1)
    try:
        yield
    finally:
        for end in (leave, wait, ready):
            os.close(end)
        os.waitpid(child, 0)


@pytest.mark.parametrize("told", [True, False])
def test_a_folder_is_free_after_a_training_whose_workers_live_on(told: bool, tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    with forked():
        if told:
            hold.release()
            let_go(take_lock(tmp_path))
        else:  # what closing the file alone comes to
            assert hold._lock is not None
            hold._lock.close()
            with pytest.raises(RunFolderError, match="in use"):
                take_lock(tmp_path)


def test_a_fork_does_not_let_go_of_what_its_parent_holds(tmp_path: Path) -> None:
    hold = Hold(tmp_path)
    with forked(hold.release), pytest.raises(RunFolderError, match="in use"):
        take_lock(tmp_path)


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    let_go(take_lock(tmp_path))
    Hold(tmp_path).release()
