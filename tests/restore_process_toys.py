"""`rlspec restore` in several processes, as torchrun starts them, one of which may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlspec.cli.main import main
from rlspec.io import launch
from rlspec.restore import checkpoint

OPTIONS: dict[str, Any] = {"modules": "q,k,o", "rank": 0.5, "rounding": "stochastic"}
FLAGS = ("--modules", "q,k,o", "--rank", "0.5", "--rounding", "stochastic")
# What each process is a copy of, so that it need not import it.
_PRELOAD = ["rlspec.cli.restore_text", "rlspec.io.stream", "rlspec.io.writer", "rlspec.restore.checkpoint"]


@dataclass
class Ended:
    """How a process ended, and what it printed."""

    code: int
    out: str
    err: str


def command(
    number: int,
    count: int,
    arguments: list[str],
    folder: Path,
    cache: str,
    threads: int,
    kill: int,
    apart: float,
) -> None:
    """The command as torchrun starts it; ``kill``: at which matrix it is to be killed."""
    for descriptor, name in ((1, f"out-{number}"), (2, f"err-{number}")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    told = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number, "RLSPEC_CACHE": cache}
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(threads)
    launch.APART = apart
    right, calls = checkpoint.Journal.append, []

    def append(self: Any, rows: Any) -> None:
        calls.append(1)
        if len(calls) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        right(self, rows)

    checkpoint.Journal.append = append  # type: ignore[method-assign]
    main(["restore", *arguments])


def together(
    count: int,
    checkpoints: tuple[Path, Path],
    out: Path,
    *more: str,
    kill: dict[int, int] | None = None,
    apart: float = 60.0,
    changed: dict[int, list[str]] | None = None,
) -> list[Ended]:
    """The command in several processes; ``changed``: what some of them are given besides."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__, "rlspec.cli.restore_text", "rlspec.io.writer", "rlspec.io.stream"]
    )
    folder = out.parent / f"said-{len(list(out.parent.glob('said-*')))}"
    folder.mkdir()
    given = ["--base", str(checkpoints[0]), "--tuned", str(checkpoints[1]), "--out", str(out), *FLAGS, *more]
    started = []
    for number in range(count):
        arguments = [*given, *(changed or {}).get(number, [])]
        values = (os.environ["RLSPEC_CACHE"], torch.get_num_threads(), (kill or {}).get(number, 0), apart)
        started.append(context.Process(target=command, args=(number, count, arguments, folder, *values)))
        started[-1].start()
    for process in started:
        process.join(90)
        assert process.exitcode is not None, "it hangs"
    return [
        Ended(process.exitcode or 0, *((folder / f"{name}-{i}").read_text() for name in ("out", "err")))
        for i, process in enumerate(started)
    ]
