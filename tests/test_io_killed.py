"""kill -9 at random moments of a writer that copies a small checkpoint."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from kill_server import KillServer
from writer_toys import content, make

from rlspec.io.index import CheckpointIndex
from rlspec.io.writer import CheckpointWriter


def write(source: str, out: str, resume: bool, overwrite: bool) -> None:
    like = CheckpointIndex.open(Path(source))
    names = {n: torch.bfloat16 for n in like.tensors if n.endswith("q")}
    with CheckpointWriter(
        Path(out), like, changed=names, fingerprint="f", resume=resume, overwrite=overwrite
    ) as writer:
        for name in writer.pending:
            writer.put(name, torch.full(like.tensors[name].shape, 1.5, dtype=torch.bfloat16))
        writer.commit()


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_random_moments(overwrite: bool, tmp_path: Path) -> None:
    """``kill -9``: under its name there is nothing (or the old folder) or the complete result; resuming completes it."""
    make(tmp_path / "in", shards=6)
    before = content(tmp_path / "in")
    old = {}
    out = tmp_path / "out"
    if overwrite:
        make(tmp_path / "old", seed=9)
        old = content(tmp_path / "old")
    rng = random.Random(0)

    def restore_old() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)

    with KillServer("test_io_killed", "write", tmp_path / "log") as server:
        _, seconds = server.run(tmp_path / "in", tmp_path / "whole", False, overwrite)
        truth = content(tmp_path / "whole")
        restore_old()
        # Up to when a kill may come. It follows how fast the machine is now, which others may be using.
        latest = 1.2 * seconds
        killed = complete = 0
        resume = False
        while killed < 25:
            moment = rng.uniform(0, latest)
            ended_early, seconds = server.run(tmp_path / "in", out, resume, overwrite, after=moment)
            if ended_early:
                latest *= 1.05
            elif not resume:
                latest = 1.2 * seconds
            killed += ended_early
            found = content(out) if out.exists() else {}
            assert found in (old, truth)
            resume = found == old
            if found == truth:
                complete += 1
                restore_old()
        server.run(tmp_path / "in", out, True, overwrite)
    assert content(out) == truth and content(tmp_path / "in") == before and complete >= 1
    assert {p.name for p in tmp_path.iterdir()} <= {"in", "out", "old", "whole", "log"}
