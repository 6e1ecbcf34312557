"""Jobs that can be killed after milliseconds: forks of a process that has imported everything.

Imports take seconds and the jobs fractions of one. The process has one thread, so a fork of it is whole. Run as a
script, this is that process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any


class KillServer:
    """Run a function of a test module in processes of their own; a context manager.

    Args:
        module, function: what to run, with the arguments of each job.
        log: file for what the latest job prints.
    """

    def __init__(self, module: str, function: str, log: Path) -> None:
        command = [sys.executable, __file__, module, function, str(log)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._log = log
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, *arguments: Any, after: float | None = None) -> tuple[bool, float]:
        """Whether it was killed (``after`` so many seconds) before its end, and how many seconds it took.

        Args:
            arguments: for the function; what JSON cannot say, as text.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, after], default=str) + "\n")
        self._process.stdin.flush()
        code, seconds = json.loads(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL), self._log.read_text()
        return code != 0, seconds

    def __enter__(self) -> KillServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _serve(module: str, function: str, log: str) -> None:
    import torch

    torch.set_num_threads(1)
    task = getattr(importlib.import_module(module), function)
    print("ready", flush=True)
    for line in sys.stdin:
        arguments, after = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            try:
                task(*arguments)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        status = _wait(child, began, after)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - began]), flush=True)


def _wait(child: int, began: float, after: float | None) -> int:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if after is not None and time.monotonic() - began > after:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.0005)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
