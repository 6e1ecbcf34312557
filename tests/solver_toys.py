"""The device's Jacobi solver compiled for the host, and matrices whose decompositions are known."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlspec.linalg import libraries, solvers
from rlspec.linalg.libraries import JacobiLibrary
from rlspec.linalg.solvers import Jacobi

CSRC = Path(__file__).resolve().parent.parent / "csrc"
F64 = torch.float64


@functools.cache
def host_jacobi() -> Jacobi:
    """The solver whose lanes and teams are loops on the host (csrc/tests/jacobi_host.cpp); compiled once a process."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "jacobi.so"
        compiler = os.environ.get("CXX", "c++")
        flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
        command = [compiler, *flags, str(CSRC / "tests" / "jacobi_host.cpp"), "-o", str(made)]
        subprocess.run(command, check=True)
        return Jacobi(JacobiLibrary(made))  # what is loaded may be unlinked


@contextmanager
def in_order(seed: int) -> Iterator[None]:
    """Within, lanes and teams of the host's solver take turns in an order of their own; 0: the plain one."""

    @contextmanager
    def current(device: torch.device) -> Iterator[int]:
        yield seed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "_current", current)
        yield


@contextmanager
def chosen_jacobi(choice: str = "jacobi") -> Iterator[None]:
    """Within, ``RLSPEC_SOLVER`` is ``choice``; what rotates on the pretend device is the host's library."""
    with pytest.MonkeyPatch.context() as patch, in_order(0):
        patch.setenv(solvers.VARIABLE, choice)
        patch.setattr(solvers, "choice_problem", lambda choice, device: None)
        patch.setattr(solvers, "_made", lambda choice: replace(host_jacobi(), name=choice))
        yield


def orthogonal(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=g)).Q


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """(n, n) float64 with the eigenvalues ``values``."""
    q = orthogonal(len(values), seed)
    a = (q * values.to(F64)) @ q.T
    return (a + a.T) / 2


def planted(values: Tensor, seed: int = 0) -> Tensor:
    """(n, n) float64 with the singular values ``values``."""
    return (orthogonal(len(values), seed) * values.to(F64)) @ orthogonal(len(values), seed + 1000).T


def departure(q: Tensor) -> float:
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())
