"""kill -9 at random moments of a writer that copies a small checkpoint."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from writer_toys import content, make

SERVER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from rlspec.io.index import CheckpointIndex
from rlspec.io.writer import CheckpointWriter
def work(source, out, resume, overwrite):
    like = CheckpointIndex.open(source)
    names = {n: torch.bfloat16 for n in like.tensors if n.endswith("q")}
    with CheckpointWriter(Path(out), like, changed=names, fingerprint="f", resume=resume, overwrite=overwrite) as writer:
        for name in writer.pending:
            e = like.tensors[name]
            writer.put(name, torch.full(e.shape, 1.5, dtype=torch.bfloat16))
        writer.commit()
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work(*order["arguments"])
            os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if order["after"] is not None and time.monotonic() - began > order["after"]:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - began]), flush=True)
"""


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
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == "ready\n"

    def run(target: Path, after: float | None, *, resume: bool) -> tuple[int, float]:
        order = {"arguments": [str(tmp_path / "in"), str(target), resume, overwrite], "after": after}
        server.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        code, seconds = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        assert code in (0, -signal.SIGKILL)
        return code, seconds

    def restore_old() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)

    _, seconds = run(tmp_path / "whole", None, resume=False)
    truth = content(tmp_path / "whole")
    restore_old()
    killed = complete = 0
    resume = False
    while killed < 25:
        code, _ = run(out, rng.uniform(0, 1.2 * seconds), resume=resume)
        killed += code != 0
        found = content(out) if out.exists() else {}
        assert found in (old, truth)
        resume = found == old
        if found == truth:
            complete += 1
            restore_old()
    run(out, None, resume=True)
    server.stdin.close()
    server.wait(timeout=60)
    assert content(out) == truth and content(tmp_path / "in") == before and complete >= 1
    assert {p.name for p in tmp_path.iterdir()} <= {"in", "out", "old", "whole"}
