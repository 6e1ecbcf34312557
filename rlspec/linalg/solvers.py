"""Who does small dense solves on a device: the host, unless ``RLSPEC_SOLVER`` chooses something that runs there.

``host`` (the default) is LAPACK, after a transfer. The others solve where the matrices are: ``jacobi`` is one-sided
Jacobi of our own (csrc/cuda, see ``linalg.jacobi``), ``triton`` the same as a Triton kernel, up to 64 x 64, which needs
no nvcc; ``cusolver`` is cuSOLVER's batched ``cusolverDnXsyevBatched``. Nobody has measured them on a card yet, and
batched solvers were seen to lose orthogonality silently, so whatever solved: residual and orthogonality are looked at on
the device, one look for a batch, and a batch that fails is solved by the host, with a warning.

Axes: ``b`` matrices of a batch, ``n`` rows and columns.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlspec.backend import triton_refusal
from rlspec.errors import BackendError, OptionError
from rlspec.linalg.jacobi import JacobiKernel, Rotates
from rlspec.linalg.libraries import CusolverLibrary, JacobiLibrary, compile_problem, compiled
from rlspec.linalg.scaling import into_range, multiplied, powers_of_two
from rlspec.ops.gram import gram

VARIABLE = "RLSPEC_SOLVER"
CHOICES = ("host", "jacobi", "cusolver", "triton")
# What rounding leaves of residual and orthogonality is this much times eps √n; LAPACK leaves about 2.
_ROUNDING = 8.0
# Departure of left vectors from orthonormal that cores are allowed, as on the host (dense.py).
_CORE_DEPARTURE = 2e-13
_MOST_MATRICES = 65535  # of a grid
# Beyond, LAPACK on one matrix at a time is as good; the Triton kernel holds a matrix in registers.
_MOST_COLUMNS = {"jacobi": 1024, "cusolver": 1024, "triton": 64}


class Solved(NamedTuple):
    """Eigenvalues (b, n), ascending, eigenvectors (b, n, n), where it failed (b,) not 0, and sweeps (b,) of Jacobi."""

    values: Tensor
    vectors: Tensor
    status: Tensor
    sweeps: Tensor | None = None


class Decomposed(NamedTuple):
    """u (b, n, n), s (b, n) descending, v (b, n, n), where it failed (b,) not 0, and sweeps (b,) of Jacobi."""

    u: Tensor
    s: Tensor
    v: Tensor
    status: Tensor
    sweeps: Tensor | None = None


class Solver(Protocol):
    """Solves batches where they are, unchecked."""

    @property
    def name(self) -> str: ...
    def eigh(self, a: Tensor) -> Solved: ...
    def svd(self, a: Tensor) -> Decomposed: ...


@dataclass(frozen=True)
class Jacobi:
    """One-sided Jacobi. What is nearly diagonal, or made so by a start, takes it fewer sweeps."""

    library: Rotates
    name: str = "jacobi"

    def eigh(self, a: Tensor, start: Tensor | None = None) -> Solved:
        """Of symmetric (b, n, n), from the orthogonal ``start`` (b, n, n), which nearly diagonalises it.

        The matrix is shifted until all eigenvalues are positive and within a factor 5: there left and right singular
        vectors are the same, so that only the rotated columns have to be kept.
        """
        power = powers_of_two(a)
        a = a / power[..., None, None]
        square = a @ a
        # The norm of A⁴ bounds the largest eigenvalue's fourth power, and closely.
        shift = 1.5 * (square @ square).abs().sum(-1).amax(-1).pow(0.25)
        moved = a + shift[:, None, None] * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        found = self.library.rotate(moved if start is None else start.mT @ moved)
        values = (found.values - shift.unsqueeze(-1)).flip(-1)
        return Solved(multiplied(values, power), found.left.flip(-2).mT, found.status, found.sweeps)

    def svd(self, a: Tensor, start: Tensor | None = None) -> Decomposed:
        """Of (b, n, n), from ``start`` (b, n, n) near the right singular vectors: the eigenvectors of the Gram matrix, if
        none is given, which take fewer sweeps to find than singular vectors, above all where values span a wide range.
        """
        a, power = into_range(a)
        first = self.eigh(gram(a)).vectors if start is None else start
        found = self.library.rotate((a @ first).mT, first.mT)
        assert found.right is not None
        return Decomposed(
            found.left.mT, multiplied(found.values, power), found.right.mT, found.status, found.sweeps
        )


@dataclass(frozen=True)
class Cusolver:
    """cuSOLVER's batched eigen-solver."""

    library: CusolverLibrary
    name: str = "cusolver"

    def eigh(self, a: Tensor) -> Solved:
        values, vectors, info = self.library.syev(a)
        return Solved(values, vectors.mT, info)

    def svd(self, a: Tensor) -> Decomposed:
        """By the Gram matrix: good for well-conditioned matrices."""
        a, power = into_range(a)
        _, z, status, _ = self.eigh(gram(a))
        image = a @ z
        s, order = image.norm(dim=-2).sort(dim=-1, descending=True, stable=True)
        u, v = (torch.take_along_dim(x, order.unsqueeze(-2), -1) for x in (image, z))
        return Decomposed(u / s.unsqueeze(-2), multiplied(s, power), v, status)


def solver_for(device: torch.device) -> Solver | None:
    """Who solves on a device; None is the host. What is not compiled yet is compiled.

    Raises:
        OptionError: ``RLSPEC_SOLVER`` holds an unknown name.
        BackendError: it asks for something that cannot run here.
    """
    choice = _choice()
    if device.type != "cuda" or choice == "host":
        return None
    if (problem := choice_problem(choice, device)) is not None:
        raise BackendError(f"the solver {choice}, which {VARIABLE} chooses, cannot run: {problem}")
    return _made(choice)


def choice_problem(choice: str, device: torch.device) -> str | None:
    """Why a choice other than the host cannot solve on a device, or None if it seems that it can."""
    if device.type != "cuda":
        return f"it is for CUDA and ROCm devices, not {device.type}"
    return triton_refusal(device) if choice == "triton" else compile_problem(device)


def most_columns(choice: str) -> int:
    """Of a matrix that a choice other than the host solves; larger ones go to the host."""
    return _MOST_COLUMNS[choice]


def summary(device: torch.device) -> str:
    """Who does small dense solves, for `rlspec env`; nothing is compiled.

    Raises:
        OptionError, BackendError: as above.
    """
    choice = _choice()
    if device.type != "cuda":
        return "host"
    if choice == "host":
        reasons: dict[str, list[str]] = {}
        for other in CHOICES[1:]:
            reason = choice_problem(other, device) or f"if {VARIABLE} says so"
            reasons.setdefault(reason, []).append(other)
        return f"host ({'; '.join(f'{_listed(names)}: {why}' for why, names in reasons.items())})"
    if (problem := choice_problem(choice, device)) is not None:
        raise BackendError(f"the solver {choice}, which {VARIABLE} chooses, cannot run: {problem}")
    most = most_columns(choice)
    return f"{choice} (compiled at its first use, up to {most} x {most}; the host beyond, and where it fails)"


def eigh(a: Tensor) -> tuple[Tensor, Tensor] | None:
    """Checked eigenvalues (..., n), ascending, and eigenvectors (..., n, n); None where the host has to solve."""
    solver = solver_for(a.device)
    if solver is None or (many := _stacked(a, most_columns(solver.name))) is None:
        return None
    values, vectors, status, _ = solver.eigh(many)
    residual = (many @ vectors - vectors * values.unsqueeze(-2)).abs()
    if not _holds(solver, a, status, values.abs(), residual, [vectors], 0.0):
        return None
    return values.reshape(a.shape[:-1]), vectors.reshape(a.shape)


def core_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Checked u (..., n, n), s (..., n) descending, v (..., n, n); None where the host has to solve."""
    solver = solver_for(a.device)
    if solver is None or (many := _stacked(a, most_columns(solver.name))) is None:
        return None
    u, s, v, status, _ = solver.svd(many)
    residual = ((u * s.unsqueeze(-2)) @ v.mT - many).abs()
    if not _holds(solver, a, status, s, residual, [u, v], _CORE_DEPARTURE):
        return None
    return u.reshape(a.shape), s.reshape(a.shape[:-1]), v.reshape(a.shape)


def _choice() -> str:
    choice = os.environ.get(VARIABLE, CHOICES[0])
    if choice not in CHOICES:
        raise OptionError(f"{VARIABLE}={choice}: unknown solver; valid: {', '.join(CHOICES)}")
    return choice


@functools.cache
def _made(choice: str) -> Solver:
    if choice == "triton":
        return Jacobi(JacobiKernel(), choice)
    path = compiled(choice)
    return Jacobi(JacobiLibrary(path)) if choice == "jacobi" else Cusolver(CusolverLibrary(path))


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _stacked(a: Tensor, most: int) -> Tensor | None:
    """(b, n, n), or None where that is too much or nothing."""
    many = a.reshape(-1, *a.shape[-2:])
    fits = 0 < many.shape[0] <= _MOST_MATRICES and 0 < many.shape[-1] <= most
    return many if fits else None


def _holds(
    solver: Solver,
    a: Tensor,
    status: Tensor,
    sizes: Tensor,
    residual: Tensor,
    bases: list[Tensor],
    allowed: float,
) -> bool:
    """Whether every matrix is solved, by one look at the device.

    Args:
        sizes: (b, n) sizes of the values; residual: (b, n, n), entries; bases: each (b, n, n), to be orthonormal.
        allowed: departure from orthonormal that is good enough, where rounding is less.
    """
    n = a.shape[-1]
    rounding = _ROUNDING * n**0.5 * torch.finfo(a.dtype).eps
    eye = torch.eye(n, dtype=a.dtype, device=a.device)
    departure = torch.stack([(basis.mT @ basis - eye).abs().amax((-2, -1)) for basis in bases]).amax(0)
    off = residual.amax((-2, -1)) / sizes.amax(-1).clamp_min(torch.finfo(a.dtype).tiny)
    # NaN is under no bar.
    good = (status == 0) & (off <= rounding) & (departure <= max(rounding, allowed))
    failed = int((~good).sum())
    if failed:
        at = int((~good).nonzero()[0])
        warnings.warn(
            f"{VARIABLE}={solver.name}: {failed} of {len(good)} matrices of {n} x {n} are not solved (the first: status "
            f"{int(status[at])}, residual {float(off[at]):.1e}, departure from orthonormal {float(departure[at]):.1e}); "
            "the host solves them all",
            RuntimeWarning,
            stacklevel=4,
        )
    return not failed
