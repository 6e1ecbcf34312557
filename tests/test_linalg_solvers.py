"""Small dense solves of a device: the algorithm on the host against LAPACK and planted values, and who is asked when."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pretend import DEVICE, pretend_device, to_pretend
from solver_toys import F64, chosen_jacobi, departure, host_jacobi, in_order, orthogonal, planted, symmetric
from torch import Tensor
from torch.utils import cpp_extension

from rlspec.errors import BackendError, OptionError
from rlspec.linalg import dense, libraries, solvers
from rlspec.linalg.solvers import Decomposed, Solved

EPS = torch.finfo(F64).eps
N = 50  # no multiple of a block
SPECTRA = {
    "flat": 3 / (1 + 4 * torch.arange(N) / 400),
    "clusters": torch.cat([torch.full((20,), 3.0), torch.full((20,), 2.0), torch.linspace(1.99, 1, 10)]),
    "equal": torch.full((N,), 2.0),
    "steep": torch.logspace(0, -12, N),
    "beyond rounding": torch.logspace(0, -30, N),
    "deficient": torch.cat([torch.linspace(3, 1, 30), torch.zeros(N - 30)]),
    "zero": torch.zeros(N),
    "of both signs": torch.cat([torch.ones(25), -torch.ones(N - 25)]),
}


def rounding(n: int, dtype: torch.dtype = F64) -> float:
    """What rounding may leave of a residual and of orthogonality, as LAPACK's error bounds grow."""
    return 8 * n**0.5 * torch.finfo(dtype).eps


def worst_eigen(a: Tensor, found: Solved, truth: Tensor) -> float:
    """Largest error of values, residual and departure from orthonormal, the first two of the largest value."""
    largest = truth.abs().amax(-1).clamp_min(1e-300)
    values = (found.values - truth).abs().amax(-1) / largest
    residual = (a @ found.vectors - found.vectors * found.values.unsqueeze(-2)).abs().amax((-2, -1)) / largest
    return max(float(values.max()), float(residual.max()), departure(found.vectors))


def worst_svd(a: Tensor, found: Decomposed, truth: Tensor) -> float:
    largest = truth.amax(-1).clamp_min(1e-300)
    values = (found.s - truth).abs().amax(-1) / largest
    rebuilt = (found.u * found.s.unsqueeze(-2)) @ found.v.mT
    residual = (rebuilt - a).abs().amax((-2, -1)) / largest
    return max(float(values.max()), float(residual.max()), departure(found.u), departure(found.v))


@pytest.mark.parametrize(("turned", "scale"), [(False, 1.0), (False, 1e200), (True, 1.0), (True, 1e-200)])
def test_planted_values_of_every_kind_in_one_batch(turned: bool, scale: float) -> None:
    truth = torch.stack([s.to(F64) for s in SPECTRA.values()]) * scale
    a = torch.stack([symmetric(s, i) for i, s in enumerate(truth)]) if turned else torch.diag_embed(truth)
    found = host_jacobi().eigh(a)
    assert found.status.tolist() == [0] * len(truth)
    assert worst_eigen(a, found, truth.sort().values) < rounding(N)
    assert bool((found.values[:, 1:] >= found.values[:, :-1]).all())
    if turned:
        a = torch.stack([planted(s, i) for i, s in enumerate(truth)])
    parts = host_jacobi().svd(a)
    assert parts.status.tolist() == [0] * len(truth)
    assert worst_svd(a, parts, truth.abs().sort(descending=True).values) < rounding(N)
    assert bool((parts.s[:, 1:] <= parts.s[:, :-1]).all()) and bool((parts.s >= 0).all())


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_any_size_is_as_right_as_lapack(n: int, dtype: torch.dtype) -> None:
    a = torch.randn(2, n, n, dtype=F64, generator=torch.Generator().manual_seed(n)).to(dtype)
    both = a + a.mT
    found = host_jacobi().eigh(both)
    assert found.values.dtype == dtype
    assert worst_eigen(both, found, torch.linalg.eigvalsh(both.double())) < rounding(n, dtype)
    # Through the Gram matrix, but no worse for it.
    assert worst_svd(a, host_jacobi().svd(a), torch.linalg.svdvals(a.double())) < rounding(n, dtype)


def test_a_matrix_does_not_depend_on_its_neighbours() -> None:
    """Nor on how many sweeps they take; and what is not finite fails alone."""
    many = torch.stack([symmetric(s, i) for i, s in enumerate(SPECTRA.values())])
    many[1, 3, 4] = many[1, 4, 3] = float("nan")
    many[2, 5, 5] = float("inf")
    together = host_jacobi().eigh(many)
    assert together.status.tolist() == [0, 2, 2, 0, 0, 0, 0, 0]
    for i in (0, 5):
        alone = host_jacobi().eigh(many[i : i + 1])
        assert torch.equal(alone.values[0], together.values[i])
        assert torch.equal(alone.vectors[0], together.vectors[i])
    assert host_jacobi().svd(many).status.tolist() == [0, 2, 2, 0, 0, 0, 0, 0]


def test_sweeps_that_are_not_enough_are_told() -> None:
    solver = host_jacobi()
    found = solver.library.rotate(planted(SPECTRA["flat"])[None], most_sweeps=3)
    assert found.status.tolist() == [1] and found.sweeps.tolist() == [3]


def test_nothing_depends_on_the_order_of_lanes_and_teams() -> None:
    a = torch.stack([planted(s, i) for i, s in enumerate(SPECTRA.values())])
    plain = host_jacobi().svd(a)
    with in_order(7):
        shuffled = host_jacobi().svd(a)
    for mine, wanted in zip(shuffled, plain, strict=True):
        assert mine is not None and wanted is not None and torch.equal(mine, wanted)


# Sweeps from the identity and from the eigenvectors of the matrix before it moved by eps of itself: the last sweep of
# each only looks. Cores, nearly diagonal, are warm without a start.
@pytest.mark.parametrize(("eps", "most"), [(0.0, 2), (1e-6, 4), (1e-3, 5)])
def test_a_warm_start_saves_sweeps(eps: float, most: int) -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(3, N, N, dtype=F64, generator=g)
    before = torch.stack([symmetric(SPECTRA["flat"], i) for i in range(3)])
    after = before + eps * (noise + noise.mT) / 2
    start = torch.linalg.eigh(before).eigenvectors
    cold, warm = host_jacobi().eigh(after), host_jacobi().eigh(after, start)
    assert cold.sweeps is not None and warm.sweeps is not None
    assert int(cold.sweeps.min()) >= 7 and int(warm.sweeps.max()) <= most
    assert worst_eigen(after, warm, torch.linalg.eigvalsh(after)) < rounding(N)
    core = torch.diag_embed(SPECTRA["flat"].to(F64)) + eps * (noise + noise.mT) / 2
    assert int(host_jacobi().eigh(core).sweeps.max()) <= most  # type: ignore[union-attr]
    parts = host_jacobi().svd(after + eps * noise, start)
    assert int(parts.sweeps.max()) <= most  # type: ignore[union-attr]
    assert worst_svd(after + eps * noise, parts, torch.linalg.svdvals(after + eps * noise)) < rounding(N)


def test_a_start_that_is_not_orthogonal_shows() -> None:
    a = symmetric(SPECTRA["flat"])[None]
    start = orthogonal(N, 5)[None] * (1 + 1e-9 * torch.arange(N, dtype=F64))
    found = host_jacobi().eigh(a, start)
    assert worst_eigen(a, found, torch.linalg.eigvalsh(a)) > 100 * rounding(N)


class Faulty:
    """A solver that is off by a little, as a device's may be, in one matrix of a batch."""

    name = "jacobi"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def eigh(self, a: Tensor) -> Solved:
        found = host_jacobi().eigh(a)
        if self.fault == "residual":
            found.values[-1, 3] += 1e-12
        elif self.fault == "orthogonality":
            found.vectors[-1, :, 3] += 1e-11 * found.vectors[-1, :, 4]
        elif self.fault == "nan":
            found.vectors[-1, 0, 0] = float("nan")
        elif self.fault == "status":
            found.status[-1] = 1
        return found

    def svd(self, a: Tensor) -> Decomposed:
        u, s, v, status, _ = host_jacobi().svd(a)
        if self.fault == "residual":
            s[-1, 3] += 1e-12
        elif self.fault == "orthogonality":
            v[-1, :, 3] += 1e-11 * v[-1, :, 4]
            u[-1, :, 4] -= 1e-11 * u[-1, :, 3]
        elif self.fault == "nan":
            u[-1, 0, 0] = float("nan")
        elif self.fault == "status":
            status[-1] = 1
        return Decomposed(u, s, v, status)


@pytest.fixture
def chosen() -> Iterator[None]:
    with chosen_jacobi():
        yield


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("shape", [(3, N, N), (N, N), (2, 2, 20, 20)])
def test_a_chosen_solver_waits_once_and_is_as_right_as_the_host(shape: tuple[int, ...]) -> None:
    a = torch.eye(shape[-1]) + 0.01 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    a = a.double()
    for solve in (
        lambda a: dense.eigh(a.mT @ a),
        lambda a: (dense.eigvalsh(a.mT @ a),),
        lambda a: (dense.values_of_gram(a.mT @ a),),
        dense.core_svd,
    ):
        with pretend_device() as report, warnings.catch_warnings():
            warnings.simplefilter("error")
            found = solve(to_pretend(a))
            assert len(report.syncs) == 1, report.syncs
            found = tuple(x.cpu() for x in found)
        wanted = solve(a)
        values = 1 if len(found) == 3 else 0
        torch.testing.assert_close(found[values], wanted[values], rtol=0, atol=rounding(shape[-1]))
        if len(found) == 3:
            rebuilt = (found[0] * found[1].unsqueeze(-2)) @ found[2].mT
            torch.testing.assert_close(rebuilt, a, rtol=0, atol=rounding(shape[-1]))


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("fault", ["residual", "orthogonality", "nan", "status"])
def test_what_a_device_gets_wrong_the_host_solves_and_says_so(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = torch.stack([symmetric(SPECTRA["flat"], i) for i in range(3)])
    for solve in (dense.eigh, dense.core_svd):
        with pretend_device():
            monkeypatch.setattr(solvers, "_made", lambda choice: Faulty("none"))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                solve(to_pretend(a))
            monkeypatch.setattr(solvers, "_made", lambda choice: Faulty(fault))
            with pytest.warns(RuntimeWarning, match=f"RLSPEC_SOLVER=jacobi: 1 of 3 matrices of {N} x {N}"):
                found = tuple(x.cpu() for x in solve(to_pretend(a)))
        for mine, wanted in zip(found, solve(a), strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.usefixtures("chosen")
def test_what_is_too_large_goes_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(solvers._MOST_COLUMNS, "jacobi", N - 1)
    a = symmetric(SPECTRA["flat"])
    with pretend_device():
        assert torch.equal(dense.eigh(to_pretend(a))[0].cpu(), dense.eigh(a)[0])


def test_without_a_choice_the_host_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(solvers.VARIABLE, raising=False)
    assert solvers.solver_for(DEVICE) is None
    for choice in solvers.CHOICES:  # on a CPU there is nobody else
        monkeypatch.setenv(solvers.VARIABLE, choice)
        assert solvers.solver_for(torch.device("cpu")) is None
        assert solvers.summary(torch.device("cpu")) == "host"


def test_choices_that_cannot_be_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(solvers.VARIABLE, "magma")
    with pytest.raises(
        OptionError, match=r"RLSPEC_SOLVER=magma: unknown solver; valid: host, jacobi, cusolver, triton$"
    ):
        solvers.solver_for(DEVICE)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv(solvers.VARIABLE, "jacobi")
    with pytest.raises(
        BackendError, match="solver jacobi, which RLSPEC_SOLVER chooses, cannot run: there is no nvcc"
    ):
        solvers.solver_for(DEVICE)
    with pytest.raises(BackendError, match="no nvcc"):
        solvers.summary(DEVICE)
    monkeypatch.delenv(solvers.VARIABLE)
    monkeypatch.setattr(solvers, "triton_refusal", lambda device: None)
    assert solvers.summary(DEVICE) == (
        "host (jacobi and cusolver: there is no nvcc (CUDA_HOME says where it is); triton: if RLSPEC_SOLVER says so)"
    )
    monkeypatch.setenv(solvers.VARIABLE, "triton")
    assert solvers.summary(DEVICE) == (
        "triton (compiled at its first use, up to 64 x 64; the host beyond, and where it fails)"
    )
    monkeypatch.setattr(solvers, "triton_refusal", lambda device: "RLSPEC_BACKEND=torch")
    for asked in (solvers.summary, solvers.solver_for):
        with pytest.raises(BackendError, match="solver triton, .* cannot run: RLSPEC_BACKEND=torch"):
            asked(DEVICE)


def test_kernels_solve_what_they_hold_and_the_host_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's library stands in for the kernel here; every answer is looked at."""
    monkeypatch.setenv(solvers.VARIABLE, "triton")
    monkeypatch.setattr(solvers, "triton_refusal", lambda device: None)
    asked = []
    rotate = host_jacobi().library.rotate
    monkeypatch.setattr(
        solvers.JacobiKernel, "rotate", lambda self, g, v=None: asked.append(g.shape) or rotate(g, v)
    )
    for n in (20, 64, 65):
        a = torch.eye(n, dtype=F64) + 0.01 * torch.randn(
            2, n, n, dtype=F64, generator=torch.Generator().manual_seed(n)
        )
        asked.clear()
        with pretend_device(), in_order(0), warnings.catch_warnings():
            warnings.simplefilter("error")
            values, _ = (x.cpu() for x in dense.eigh(to_pretend(a + a.mT)))
            u, s, v = (x.cpu() for x in dense.core_svd(to_pretend(a)))
        assert asked == ([] if n == 65 else [(2, n, n)] * 3)
        torch.testing.assert_close(values, torch.linalg.eigvalsh(a + a.mT), rtol=0, atol=4 * rounding(n))
        torch.testing.assert_close((u * s.unsqueeze(-2)) @ v.mT, a, rtol=0, atol=rounding(n))


def test_libraries_are_compiled_from_the_packaged_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's extension loader, without torch's headers; what the compiler says comes first in one line."""
    asked = {}

    def load(name: str, sources: list[str], **options: object) -> None:
        asked[name] = (Path(sources[0]), options)
        if "cusolver" in name:
            raise RuntimeError(
                "Error building: nvcc -D ...\nx.cu:2: fatal error: no cusolverDn.h\nninja: stopped"
            )

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(torch.ops, "loaded_libraries", {str(tmp_path / "rlspec_jacobi.so"), "/lib/other.so"})
    libraries.compiled.cache_clear()
    assert libraries.compiled("jacobi") == tmp_path / "rlspec_jacobi.so"
    source, options = asked["rlspec_jacobi"]
    assert source.is_file() and options["is_python_module"] is False
    with pytest.raises(
        BackendError, match=r"cusolver\.cu does not compile: x\.cu:2: fatal error: no cusolverDn\.h$"
    ):
        libraries.compiled("cusolver")
    libraries.compiled.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("choice", solvers.CHOICES[1:])
def test_on_a_gpu(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library as it is compiled there, unaided: a warning would be the host's help."""
    monkeypatch.setenv(solvers.VARIABLE, choice)
    a = torch.stack([symmetric(SPECTRA["flat"], i) for i in range(5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, _ = dense.eigh(a.cuda())
        _, s, _ = dense.core_svd(a.cuda())
    torch.testing.assert_close(values.cpu(), torch.linalg.eigvalsh(a), rtol=0, atol=10 * rounding(N))
    torch.testing.assert_close(s.cpu(), torch.linalg.svdvals(a), rtol=0, atol=10 * rounding(N))
