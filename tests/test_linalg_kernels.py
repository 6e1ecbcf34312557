"""Decompositions through the kernels, end to end, on machines without a GPU."""

from __future__ import annotations

import importlib.util

import pytest
from interpreter_run import run_interpreted


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_svd_in_the_interpreter() -> None:
    run_interpreted("svd.py")
