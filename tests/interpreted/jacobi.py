"""jacobi in Triton's interpreter, against float64 LAPACK, and faults put into it on purpose.

Run by tests/test_linalg_jacobi.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from interpreter_toys import (
    HALO,
    assert_caught,
    assert_order_does_not_matter,
    far_apart,
    in_halo,
    results_in_halo,
    whole_buffer,
    with_fault,
)
from jacobi_cases import F32, F64, basis, matrices, special, worst
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from rlspec.kernels import jacobi as kernel
from rlspec.kernels.configs import Config
from rlspec.linalg import solvers
from rlspec.linalg.jacobi import MOST_SWEEPS, Rotated

TILES = (Config(16, 16, 16, 1, 1), Config(32, 32, 32, 2, 1), Config(64, 64, 64, 4, 1))
BAR = 2.0


def rotated(
    module: ModuleType,
    g: Tensor,
    v: Tensor | None = None,
    config: Config | None = None,
    most_sweeps: int = 15,
) -> Rotated:
    return Rotated(*module.jacobi_triton(g, v, most_sweeps=most_sweeps, config=config))


def check(found: Rotated, g: Tensor, v: Tensor | None = None) -> None:
    """Converged, and as right as rounding allows; NaN is under no bar."""
    assert found.status.tolist() == [0] * len(g)
    assert all(sweeps > 0 for sweeps in found.sweeps.tolist())
    assert worst(found, g, v) <= BAR


def against_lapack(
    module: ModuleType,
    sizes: tuple[int, ...],
    tiles: tuple[Config, ...] = TILES[:1],
    dtypes: tuple[torch.dtype, ...] = (F32,),
) -> None:
    for n in sizes:
        for dtype in dtypes:
            g, v = matrices(2, n, dtype), basis(2, n, dtype)
            for config in tiles:
                check(rotated(module, in_halo(g), in_halo(v), config), g, v)


def of_every_kind(module: ModuleType, n: int = 6, dtype: torch.dtype = F32) -> None:
    """A batch whose matrices take different numbers of sweeps, or have values that no vector belongs to."""
    g = torch.stack([*special(n, dtype).values()])
    check(rotated(module, in_halo(g), None, TILES[0]), g)


def what_cannot_be_done_is_told(module: ModuleType) -> None:
    """Of the matrix that it is, alone; and what is left there is defined."""
    g = matrices(5, 5, F32)
    wanted = rotated(module, g, g)
    g[1, 2, 3], g[2, 4, 0], g[3, 0, 0] = torch.nan, torch.inf, 1e30  # whose square is past float32
    found = rotated(module, g, g)
    assert found.status.tolist() == [0, 2, 2, 2, 0] and found.sweeps.tolist()[1:4] == [0, 0, 0]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine is not None and theirs is not None
        assert torch.equal(mine[[0, 4]], theirs[[0, 4]])
    assert bool((found.left[1:4] == 0).all())  # written, if with nothing
    few = rotated(module, matrices(2, 7, F64), None, None, 2)
    assert few.status.tolist() == [1, 1] and few.sweeps.tolist() == [2, 2]


def writes_stay_inside(module: ModuleType) -> None:
    g, v = matrices(2, 5, F32), basis(2, 5, F32)
    with results_in_halo() as made:
        module.jacobi_triton(g, v, most_sweeps=MOST_SWEEPS, config=TILES[0])
    assert len(made) == 5
    for one in made[:3]:
        assert not one.isnan().any() and whole_buffer(one).isnan().sum() == 2 * HALO
    for one in made[3:]:
        assert int((whole_buffer(one) == 0x5A5A5A5A).sum()) == 2 * HALO


def offsets_have_64_bits(module: ModuleType) -> None:
    for shape, strides in (((3, 2, 2), (1 << 30, 8)), ((1, 5, 5), (1 << 32, 1 << 29))):
        g, v = matrices(shape[0], shape[1], F32), basis(shape[0], shape[1], F32)
        for place in range(2):
            far = [g, v]
            far[place] = far_apart(shape, strides, far[place])
            # It copies whole buffers back onto themselves, gigabytes here.
            with mock.patch.object(GridExecutor, "_restore_args_dev"):
                check(rotated(module, *far, TILES[0]), g, v)


# The quickest that most faults are caught by come first.
GATES: tuple[Callable[[ModuleType], None], ...] = (
    lambda module: against_lapack(module, (5,)),
    writes_stay_inside,
    what_cannot_be_done_is_told,
    offsets_have_64_bits,
    of_every_kind,
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F32, F64])
def test_against_lapack(dtype: torch.dtype) -> None:
    against_lapack(kernel, (1, 2, 3, 16), dtypes=(dtype,))
    against_lapack(kernel, (7,), TILES, (dtype,))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("n", "dtype"), [(31, F32), (33, F64), (64, F32)])
def test_against_lapack_at_the_edges_of_tiles(n: int, dtype: torch.dtype) -> None:
    g, v = matrices(1, n, dtype), basis(1, n, dtype)
    check(rotated(kernel, in_halo(g), in_halo(v)), g, v)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("n", "dtype"), [(6, F64), (6, F32), (7, F64)])
def test_of_every_kind(n: int, dtype: torch.dtype) -> None:
    of_every_kind(kernel, n, dtype)


def test_what_cannot_be_done_is_told() -> None:
    what_cannot_be_done_is_told(kernel)


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


def test_offsets_have_64_bits() -> None:
    offsets_have_64_bits(kernel)


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.stack([*special(6, F32).values()])

    def run() -> list[Tensor]:
        return [t for t in rotated(kernel, g, basis(len(g), 6, F32), TILES[0]) if t is not None]

    assert_order_does_not_matter(monkeypatch, run)


def test_no_bit_depends_on_neighbours_or_on_the_tile() -> None:
    g = torch.stack([*special(6, F64).values()])
    together = rotated(kernel, g, None, TILES[0])
    for i in (0, 3, 5):
        alone = rotated(kernel, g[i : i + 1], None, TILES[0])
        assert torch.equal(alone.left[0], together.left[i]) and torch.equal(
            alone.values[0], together.values[i]
        )


def test_any_layout_is_taken() -> None:
    g, v = matrices(2, 9, F32), basis(2, 9, F32)
    wanted = rotated(kernel, g, v)
    whole = torch.zeros(2, 12, 12)
    whole[:, 1:10, 2:11] = g
    for mine, theirs in ((whole[:, 1:10, 2:11], v), (g.mT.contiguous().mT, v), (g, v.mT.contiguous().mT)):
        for found, expected in zip(rotated(kernel, mine, theirs), wanted, strict=True):
            assert found is not None and expected is not None and torch.equal(found, expected)


def test_given_tensors_are_left_alone() -> None:
    g, v = matrices(2, 6, F32), basis(2, 6, F32)
    before = g.clone(), v.clone()
    rotated(kernel, g, v)
    assert torch.equal(g, before[0]) and torch.equal(v, before[1])


FAULTS = {
    "last column left out": (
        "(column < n)[:, None] & (column < n)[None, :]",
        "(column < n - 1)[:, None] & (column < n)[None, :]",
    ),
    "no mask on columns": (
        "inside = (column < n)[:, None] & (column < n)[None, :]",
        "inside = (column < n)[:, None] & (column == column)[None, :]",
    ),
    "32-bit matrix": ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    "32-bit column": ("wide = column.to(tl.int64)", "wide = column"),
    "first matrix of V": ("v + matrix * v_matrix", "v"),
    "rows of V as those of G": ("wide[:, None] * v_row", "wide[:, None] * g_row"),
    "NaN passes for a number": ("squares <= LARGEST", "(squares <= LARGEST) | (squares != squares)"),
    "infinity passes for a number": ("squares <= LARGEST", "squares == squares"),
    "a round left out": ("range(others)", "range(others - 1)"),
    "an odd column meets nobody": ("others = (n + 1) // 2 * 2 - 1", "others = n // 2 * 2 - 1 + 2 * (n == 1)"),
    "the last player meets the next": (
        "tl.where(column == others, turn, partner)",
        "tl.where(column == others, (turn + 1) % others, partner)",
    ),
    "columns of one length turn the same way": (
        "| ((zeta == 0) & (column > partner))",
        "| ((zeta == 0) & (column < 0))",
    ),
    "half the angle": ("cosine * tangent, 0.0", "cosine * tangent * 0.5, 0.0"),
    "tangent of the whole angle": ("half = _over(sine, (1 + cosine)[:, None])", "half = sine"),
    "the other way": ("tl.where(back, -1.0, 1.0)", "tl.where(back, 1.0, -1.0)"),
    "lengths of the partner taken for one's own": ("theirs = tl.gather(mine, partner, 0)", "theirs = mine"),
    "V turned from the columns of G": ("tl.gather(y, index, 0) + half * y", "other + half * y"),
    "V not turned": ("y = y - sine * (tl.gather(y, index, 0) + half * y)", "y = y + 0.0 * sine"),
    "cosines of the last round alone": (
        "off = tl.maximum(off, tl.max(cosines, axis=0))",
        "off = tl.max(cosines, axis=0)",
    ),
    "rounding is turned for ever": (
        "least = _root(tl.max(squares, axis=0)) * tolerance",
        "least = 0.0 * tolerance",
    ),
    "a tolerance of a tenth": ("_root(tl.cast(n, x.dtype)) * EPS", "_root(tl.cast(n, x.dtype)) * EPS * 0.1"),
    "a tolerance too large": ("_root(tl.cast(n, x.dtype)) * EPS", "_root(tl.cast(n, x.dtype)) * EPS * 64"),
    "sweeps not counted": ("done += 1", "done += tl.where(off <= tolerance, 1, 0)"),
    "no end of sweeps": ("(done < most_sweeps)", "(done < 40)"),
    "not in order": ("tl.sum(longer.to(tl.int32), axis=1), column)", "column, column)"),
    "equal values in one place": (
        "(column[None, :] < column[:, None])",
        "(column[None, :] < 0 * column[:, None])",
    ),
    "vectors not of length one": ("_over(x, tl.where(known, norms, 1.0)[:, None])", "x"),
    "vectors of rounding": ("(state < 2) & (norms > least)", "(state < 2) & (norms >= 0)"),
    "missing vectors left out": (
        "(norms <= least)).to(tl.int32), axis=0) > 0",
        "(norms <= least)).to(tl.int32), axis=0) > n",
    ),
    "a missing vector of padding": (
        "held = tl.where(there, tl.sum(x * x, axis=0), 2.0)",
        "held = tl.sum(x * x, axis=0)",
    ),
    "a missing vector not orthogonalised": ("for _ in range(2):", "for _ in range(0):"),
    "not finite and in no place": ("tl.where(state < 2, tl.sum(longer", "tl.where(n > 0, tl.sum(longer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    assert_caught(with_fault(kernel, *FAULTS[fault], tmp_path), GATES)


@pytest.mark.parametrize(
    ("g", "v", "config", "message"),
    [
        (torch.zeros(3, 4), None, None, "non-empty stack"),
        (torch.zeros(1, 0, 0), None, None, "non-empty"),
        (torch.zeros(1, 3, 4), None, None, r"\(b, n, n\), found \(1, 3, 4\)"),
        (torch.zeros(1, 4, 4).half(), None, None, "float16"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).double(), None, "expected V .* found .* torch.float64"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 3), None, "expected V"),
        (torch.zeros(1, 65, 65), None, None, "up to 64 columns, found 65"),
        (torch.zeros(1, 20, 20), None, TILES[0], "at least 20, found 16 x 16"),
        (torch.zeros(1, 4, 4), None, Config(16, 32, 16, 1, 1), "square tile"),
    ],
)
def test_refusals(g: Tensor, v: Tensor | None, config: Config | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.jacobi_triton(g, v, most_sweeps=1, config=config)


def test_eigen_solves_and_cores_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a device is asked for them, cold and from the vectors of a matrix nearby."""
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    solver = solvers._made("triton")
    assert isinstance(solver, solvers.Jacobi)
    for dtype in (F32, F64):
        a, noise = matrices(4, 12, dtype).chunk(2)
        both = a + a.mT
        moved = both + 1e-4 * (noise + noise.mT)
        start = torch.linalg.eigh(both).eigenvectors
        bar = 8 * 12**0.5 * torch.finfo(dtype).eps  # what the check after a device's solve allows
        cold, warm = solver.eigh(moved), solver.eigh(moved, start)
        truth = torch.linalg.eigvalsh(moved.double())
        for found in (cold, warm):
            assert found.status.tolist() == [0, 0]
            residual = (moved @ found.vectors - found.vectors * found.values[:, None]).abs().max()
            error = (found.values - truth).abs().max()
            assert float(torch.maximum(error, residual)) <= bar * float(truth.abs().max())
        assert cold.sweeps is not None and warm.sweeps is not None
        assert int(warm.sweeps.max()) < int(cold.sweeps.min())
        u, s, v, status, _ = solver.svd(a)
        error = (s - torch.linalg.svdvals(a.double())).abs().max()
        residual = ((u * s[:, None]) @ v.mT - a).abs().max()
        assert status.tolist() == [0, 0] and float(torch.maximum(error, residual)) <= bar * float(s.max())
