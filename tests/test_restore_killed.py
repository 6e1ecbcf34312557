"""kill -9 at random moments of a restoration: nothing half-done ever has the output's name, and --resume ends alike."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from kill_server import KillServer
from restore_toys import bytes_of, save_model, tune

from rlspec.cli.main import main

KILLS = 50
# What a restoration imports late, it is to have when it is forked.
for module in ("cli.restore", "cli.restore_text", "io.stream", "io.writer", "restore.checkpoint"):
    import_module(f"rlspec.{module}")


def restore(*arguments: str) -> None:
    """The command, in a process of its own; its own way of ending is that of a command."""
    with pytest.raises(SystemExit) as end:
        main(["restore", *arguments])
    assert not end.value.code


@pytest.fixture
def server(tmp_path: Path) -> Iterator[KillServer]:
    with KillServer("test_restore_killed", "restore", tmp_path / "log") as server:
        yield server


def test_killed_anywhere_it_ends_the_same(server: KillServer, tmp_path: Path) -> None:
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
        "0.5",
    ]
    _, first = server.run(*arguments, "--out", whole)
    truth = bytes_of(whole)
    _, second = server.run(*arguments, "--out", whole, "--overwrite")
    assert bytes_of(whole) == truth
    # Up to when a kill may come. It follows how fast the machine is now, which others may be using.
    latest = 1.1 * min(first, second)
    rng = random.Random(0)
    killed = finished = went_on = 0
    resume: list[str] = []
    while killed < KILLS:
        moment = rng.uniform(0, latest)
        ended_early, seconds = server.run(*arguments, "--out", out, "--report", file, *resume, after=moment)
        if ended_early:
            latest *= 1.05
        elif not resume:
            latest = 1.1 * seconds
        killed += ended_early
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
            assert ended_early
            resume = ["--resume"]
    server.run(*arguments, "--out", out, "--resume")
    assert bytes_of(out) == truth
    assert (bytes_of(base), bytes_of(tuned)) == inputs
    # Both kinds of end were seen, and work of killed processes was taken over.
    assert finished >= 1 and went_on >= 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"base", "tuned", "out", "whole", "log", "report.json", ".report.json.tmp"}, left
