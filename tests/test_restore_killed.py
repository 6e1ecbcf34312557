"""kill -9 at random moments of a restoration: nothing half-done ever has the output's name, and --resume ends alike."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from restore_toys import bytes_of, save_model, tune

KILLS = 50

# Imports take seconds and a restoration a fraction of one: each is a fork of a process that has imported everything.
# It has no other threads then, so a fork is whole.
SERVER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
import rlspec.restore.checkpoint, rlspec.io.stream, rlspec.io.writer, rlspec.cli.restore_text
from rlspec.cli.main import main
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        out = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1); os.dup2(out, 2)
        try:
            main(order["arguments"])
        except SystemExit as end:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(end.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if order["after"] is not None and time.monotonic() - began > order["after"]:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - began]), flush=True)
"""


class Server:
    def __init__(self, log: Path) -> None:
        command = [sys.executable, "-c", SERVER]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._log = log
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, arguments: list[Any], after: float | None = None) -> tuple[int, float]:
        """Exit code (-9 where it was killed ``after`` so many seconds) and seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"arguments": ["restore", *map(str, arguments)], "after": after, "log": str(self._log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        code, seconds = json.loads(self._process.stdout.readline())
        assert code in (0, -9), self._log.read_text()
        return code, seconds

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "log")
    yield server
    server.close()


def test_killed_anywhere_it_ends_the_same(server: Server, tmp_path: Path) -> None:
    base, tuned, out, whole, file = (
        tmp_path / name for name in ("base", "tuned", "out", "whole", "report.json")
    )
    save_model(base, "llama", dtype=torch.bfloat16, shard="40KB")
    tune(base, tuned)
    inputs = bytes_of(base), bytes_of(tuned)
    arguments = [
        "--base",
        base,
        "--tuned",
        tuned,
        "--rounding",
        "stochastic",
        "--modules",
        "q,k",
        "--rank",
        0.5,
    ]
    _, first = server.run([*arguments, "--out", whole])
    truth = bytes_of(whole)
    _, seconds = server.run([*arguments, "--out", whole, "--overwrite"])
    assert bytes_of(whole) == truth
    rng = random.Random(0)
    killed = finished = went_on = 0
    resume: list[str] = []
    while killed < KILLS:
        moment = rng.uniform(0, 1.1 * min(first, seconds))
        code, _ = server.run([*arguments, "--out", out, "--report", file, *resume], after=moment)
        killed += code != 0
        if out.exists():
            assert bytes_of(out) == truth
            shutil.rmtree(out)
            finished += 1
            if file.exists():
                report = json.loads(file.read_text())
                assert len(report["matrices"]) == 4
                went_on += report["resumed"] > 0
                file.unlink()
            resume = []
        else:
            assert code != 0
            resume = ["--resume"]
    server.run([*arguments, "--out", out, "--resume"])
    assert bytes_of(out) == truth
    assert (bytes_of(base), bytes_of(tuned)) == inputs
    # Both kinds of end were seen, and work of killed processes was taken over.
    assert finished >= 1 and went_on >= 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"base", "tuned", "out", "whole", "log", "report.json", ".report.json.tmp"}, left
