"""Small dense solves, all choices side by side: what rlspec takes, what it could, and what torch offers on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from gpu_cases import Case
from gpu_clock import Run
from torch import Tensor

from rlspec.errors import BackendError
from rlspec.linalg import solvers
from rlspec.linalg.dense import core_svd, eigh
from rlspec.linalg.jacobi import Rotated, Rotates
from rlspec.linalg.solvers import Decomposed, Jacobi, Solved, Solver
from rlspec.ops.reference import jacobi_ref

Found = TypeVar("Found", Solved, Decomposed)
MOVED = 1e-3  # from the matrix whose vectors a warm start has, of its entries
DRIVERS = ("gesvd", "gesvdj", "gesvda")  # of torch.linalg.svd; gesvdp is not among them


def device_solvers(device: torch.device) -> tuple[dict[str, Solver], list[str]]:
    """What ``RLSPEC_SOLVER`` could choose on a device, by name, and why the rest is left out."""
    found: dict[str, Solver] = {}
    left_out = []
    for name in solvers.CHOICES[1:]:
        problem = solvers.choice_problem(name, device)
        try:
            if problem is None:
                found[name] = solvers._made(name)
        except (BackendError, OSError) as error:
            problem = str(error)
        if problem is not None:
            left_out.append(f"{name}: left out, {problem}.")
    return found, left_out


def eigen_error(a: Tensor, values: Tensor, vectors: Tensor) -> float:
    """Residual and departure from orthonormal over their bar."""
    residual = (a @ vectors - vectors * values.unsqueeze(-2)).abs().amax() / a.abs().amax()
    return _over(torch.maximum(residual, _departure(vectors)), 1e-13 * a.shape[-1])


def core_error(a: Tensor, u: Tensor, s: Tensor, v: Tensor) -> float:
    """Residual and departures from orthonormal over their bar."""
    residual = ((u * s.unsqueeze(-2)) @ v.mT - a).abs().amax() / a.abs().amax()
    off = torch.maximum(_departure(u), _departure(v))
    return _over(torch.maximum(residual, off), 1e-12 * a.shape[-1])


def _departure(q: Tensor) -> Tensor:
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().amax()


def _over(error: Tensor, bar: float) -> float:
    return float(torch.nan_to_num(error, nan=float("inf"))) / bar


def solve_cases(count: int, sizes: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    """Random symmetric matrices: eigen-solves, and decompositions as cores get them."""
    found, left_out = device_solvers(device)
    for n in sizes:
        choices = {name: solver for name, solver in found.items() if n <= solvers.most_columns(name)}
        generator = torch.Generator().manual_seed(n)
        before, noise = (torch.randn(count, n, n, generator=generator, dtype=torch.float64) for _ in range(2))
        before = before + before.mT
        a = (before + MOVED * (noise + noise.mT)).to(device)
        if isinstance(kernel := choices.get("triton"), Jacobi):
            yield from (_jacobi_case(kernel.library, a.to(dtype)) for dtype in (torch.float32, torch.float64))
        yield _eigen_case(a, before, choices, left_out)
        yield _core_case(a, before, choices, left_out)


def jacobi_error(a: Tensor, found: Rotated) -> float:
    """Of values, of what U S Vᵀ leaves of A, and departures from orthonormal over their bar; what failed is over it."""
    assert found.right is not None
    u, s, v = found.left.mT.double(), found.values.double(), found.right.mT.double()
    truth, _, _ = jacobi_ref(a.mT)
    largest = truth.amax()
    off = ((u * s.unsqueeze(-2)) @ v.mT - a).abs().amax() / largest
    errors = [(s - truth).abs().amax() / largest, off, _departure(u), _departure(v)]
    error = torch.where((found.status != 0).any(), torch.nan, torch.stack(errors).amax())
    return _over(error, 4 * a.shape[-1] ** 0.5 * torch.finfo(a.dtype).eps)


def _jacobi_case(kernel: Rotates, a: Tensor) -> Case:
    """Both sides of general matrices, cold. Flops are counted from the sweeps that the kernel took."""
    count, n, _ = a.shape
    columns, start = a.mT.contiguous(), torch.eye(n, dtype=a.dtype, device=a.device).expand(a.shape)
    name = str(a.dtype).removeprefix("torch.")
    flops = 0.0
    try:
        sweeps = kernel.rotate(columns, start).sweeps
        told = f"{int(sweeps.max())} sweeps at most"
        # A pair's three products, and two columns of A V and of V turned.
        flops = float(sweeps.sum()) * n * (n - 1) / 2 * 18 * n
    except Exception as problem:  # the other cases are worth knowing all the same
        told = f"{type(problem).__name__}: {problem}"
    return Case(
        f"jacobi, {count} x {n} x {n} {name}",
        {
            "triton": lambda: kernel.rotate(columns, start),
            f"torch.linalg.svd, {name}": lambda: torch.linalg.svd(a),
        },
        lambda: jacobi_error(a, kernel.rotate(columns, start)),
        bytes=4.0 * count * n * n * a.element_size(),
        flops=flops,
        notes=[f"jacobi, {n} x {n} {name}: {told}."],
    )


def _eigen_case(a: Tensor, before: Tensor, choices: dict[str, Solver], left_out: list[str]) -> Case:
    single = a.float()
    variants: dict[str, Run] = {
        "rlspec (float64, on the host)": lambda: eigh(a),
        "torch.linalg.eigh, float64": lambda: torch.linalg.eigh(a),
        "torch.linalg.eigh, float32": lambda: torch.linalg.eigh(single),
    }
    notes = list(left_out)
    start = torch.linalg.eigh(before).eigenvectors.to(a.device)
    for name, solver in choices.items():
        calls: dict[str, Callable[[], Solved]] = {f"{name}, cold": lambda solver=solver: solver.eigh(a)}
        if isinstance(solver, Jacobi):
            calls[f"{name}, warm"] = lambda solver=solver: solver.eigh(a, start)
        for title, call in calls.items():
            _admit(title, call, lambda x: eigen_error(a, x.values, x.vectors), variants, notes)
    title = f"eigen-solves, {len(a)} x {a.shape[-1]} x {a.shape[-1]}"
    return Case(title, variants, lambda: eigen_error(a, *eigh(a)), notes=notes)


def _core_case(a: Tensor, before: Tensor, choices: dict[str, Solver], left_out: list[str]) -> Case:
    single = a.float()
    variants: dict[str, Run] = {
        "rlspec (core_svd, on the host)": lambda: core_svd(a),
        "torch.linalg.svd, float64": lambda: torch.linalg.svd(a),
        "torch.linalg.svd, float32": lambda: torch.linalg.svd(single),
    }
    if a.is_cuda:
        for driver in DRIVERS:
            variants[f"torch.linalg.svd, float64, {driver}"] = lambda driver=driver: torch.linalg.svd(
                a, driver=driver
            )
    notes = list(left_out)
    start = torch.linalg.svd(before).Vh.mT.to(a.device)
    for name, solver in choices.items():
        calls: dict[str, Callable[[], Decomposed]] = {f"{name}, cold": lambda solver=solver: solver.svd(a)}
        if isinstance(solver, Jacobi):
            calls[f"{name}, warm"] = lambda solver=solver: solver.svd(a, start)
        for title, call in calls.items():
            _admit(title, call, lambda x: core_error(a, x.u, x.s, x.v), variants, notes)
    title = f"decompositions of cores, {len(a)} x {a.shape[-1]} x {a.shape[-1]}"
    return Case(title, variants, lambda: core_error(a, *core_svd(a)), notes=notes)


def _admit(
    title: str,
    call: Callable[[], Found],
    error_of: Callable[[Found], float],
    variants: dict[str, Run],
    notes: list[str],
) -> None:
    """A variant that is right is timed; another is told."""
    try:
        found = call()
        error = error_of(found)
    except Exception as problem:  # the others are worth knowing all the same
        notes.append(f"{title}: {type(problem).__name__}: {problem}.")
        return
    taken = "" if found.sweeps is None else f", {int(found.sweeps.max())} sweeps"
    notes.append(f"{title}: error / bar {error:.2g}{taken}{'' if error <= 1 else '; wrong: not timed'}.")
    if error <= 1:
        variants[title] = call
