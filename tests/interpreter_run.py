"""Tests of a kernel in Triton's interpreter run in a process of their own: TRITON_INTERPRET decides what a kernel is
when its module is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_interpreted(file: str) -> None:
    """Pass every test of a file in ``interpreted/``, none skipped."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"interpreted/{file}"]
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
    assert "skipped" not in result.stdout
