"""residual_norms in Triton's interpreter, against float64, and faults put into it on purpose.

Run by tests/test_op_residual_norms.py in a process with TRITON_INTERPRET=1.
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
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from rlspec.kernels import residual_norms as kernel
from rlspec.kernels.configs import Config
from rlspec.ops.reference import residual_norms_ref
from rlspec.ops.residual_norms import residual_norms

SIZES = ((1, 1, 1, 1), (3, 17, 33, 5), (2, 65, 40, 67))  # L, R, K, c
TILES = (Config(16, 16, 16, 4, 1), Config(32, 16, 64, 4, 1), Config(64, 64, 32, 4, 1))


def given(sizes: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrices, rows, inner, columns = sizes
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, inner), (inner, columns), (rows, columns), (columns,))
    a, x, y, s = (torch.randn(matrices, *shape, generator=g) for shape in shapes)
    return a, x, y, s


def check(found: Tensor, a: Tensor, x: Tensor, y: Tensor, s: Tensor) -> None:
    """``found`` is the length of each column, to what float32 rounds entries by before they are squared."""
    a, x, y, s = (t.double() for t in (a, x, y, s))
    exact = (a @ x - y * s.unsqueeze(-2)).norm(dim=-2)
    entries = a.abs() @ x.abs() + y.abs() * s.abs().unsqueeze(-2)
    bar = (a.shape[-1] + 4) * 2.0**-24 * entries.norm(dim=-2)
    assert found.dtype == torch.float64
    assert bool(((found - exact).abs() <= bar).all())  # false for NaN


def against_float64(
    module: ModuleType,
    sizes: tuple[tuple[int, int, int, int], ...] = SIZES,
    tiles: tuple[Config, ...] = TILES,
) -> None:
    for size in sizes:
        a, *others = given(size)
        for stored in (in_halo(a), in_halo(a.mT.contiguous()).mT):
            for config in tiles:
                found = module.residual_norms_triton(stored, *map(in_halo, others), config=config)
                check(found, a, *others)


def cancelled(module: ModuleType) -> None:
    """Exact triplets of small whole numbers: nothing is left, to the bit, and float64 sums tell a single entry."""
    a = torch.diag(torch.arange(1.0, 41.0)).repeat(2, 1, 1)
    eye = torch.eye(40).repeat(2, 1, 1)
    y = eye.clone()
    y[1, 3, 5] = 2.0**-40
    found = module.residual_norms_triton(a, eye, y, a.diagonal(dim1=-2, dim2=-1), config=TILES[0])
    assert float(found[1, 5]) == 6 * 2.0**-40 and found.count_nonzero() == 1


def writes_stay_inside(module: ModuleType) -> None:
    with results_in_halo() as made:
        module.residual_norms_triton(*given(SIZES[1]), config=TILES[0])
    assert not made[0].isnan().any() and whole_buffer(made[0]).isnan().sum() == 2 * HALO


def offsets_have_64_bits(module: ModuleType) -> None:
    for sizes, strides in (((3, 6, 7, 7), (1 << 30, 8)), ((1, 70, 70, 7), (1 << 32, 1 << 26))):
        near = given(sizes)
        for place in range(4):
            tensors = list(near)
            if place == 3:
                tensors[0] = far_apart(tuple(near[0].mT.shape), strides, near[0].mT).mT
            else:
                tensors[place] = far_apart(tuple(near[place].shape), strides, near[place])
            # It copies whole buffers back onto themselves, gigabytes here.
            with mock.patch.object(GridExecutor, "_restore_args_dev"):
                check(module.residual_norms_triton(*tensors, config=TILES[1]), *near)


GATES: tuple[Callable[[ModuleType], None], ...] = (
    writes_stay_inside,
    lambda module: against_float64(module, SIZES[1:], TILES[:1]),
    cancelled,
    offsets_have_64_bits,
)


@pytest.mark.usefixtures("poisoned_memory")
def test_against_float64() -> None:
    against_float64(kernel)


def test_exact_triplets_leave_nothing() -> None:
    cancelled(kernel)


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


def test_offsets_have_64_bits() -> None:
    offsets_have_64_bits(kernel)


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    of = given(SIZES[2])
    assert_order_does_not_matter(monkeypatch, lambda: kernel.residual_norms_triton(*of, config=TILES[0]))


FAULTS = {
    "inner mask one too far": ("left = inner < K - start", "left = inner < K - start + 1"),
    "last tile left out": ("range(0, K, BK)", "range(0, K - BK + 1, BK)"),
    "no mask on stored columns": ("axis=0), mask=column < C)", "axis=0))"),
    "no mask on rows": ("image = tl.load(y_at, mask=(row < R)[:, None] &", "image = tl.load(y_at, mask="),
    "32-bit matrix": ("tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    "32-bit row": ("(tl.program_id(0) // column_tiles).to(tl.int64)", "(tl.program_id(0) // column_tiles)"),
    "32-bit inner": ("inner = tl.arange(0, BK).to(tl.int64)", "inner = tl.arange(0, BK)"),
    "32-bit step": ("tl.cast(x_row, tl.int64) * BK", "x_row * BK"),
    "32-bit step of the matrix": ("tl.cast(matrix_row, tl.int64) * BK", "matrix_row * BK"),
    "values of the first matrix": ("s + which * C + column", "s + column"),
    "residual left out": ("sums - image * value[None, :]", "sums"),
    "squares of the first tile": ("tl.cdiv(R, BR) + row_tile) * C", "tl.cdiv(R, BR)) * C"),
    "sum of the tile along rows": (
        "(difference * difference, axis=0)",
        "(tl.trans(difference * difference), axis=0)",
    ),
    "not turned": ("a = tl.trans(a)", "a = tl.trans(tl.trans(a))"),
    "difference in bfloat16": (".to(tl.float64)", ".to(tl.bfloat16).to(tl.float64)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    assert_caught(with_fault(kernel, *FAULTS[fault], tmp_path), GATES)


def test_refusals() -> None:
    of = given((2, 4, 6, 3))
    for place in range(4):
        for wrong in (of[place][:1], of[place].double()):
            with pytest.raises(ValueError, match="expected "):
                kernel.residual_norms_triton(*of[:place], wrong, *of[place + 1 :])
    with pytest.raises(ValueError, match="non-empty"):
        kernel.residual_norms_triton(torch.zeros(0, 4, 6), *of[1:])


def test_the_public_operation_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    launched = mock.Mock(side_effect=kernel.residual_norms_triton)
    monkeypatch.setattr(kernel, "residual_norms_triton", launched)
    a, v, u, s = given((2, 40, 33, 9))
    found = residual_norms(a, u, s, v)
    assert found.dtype == torch.float32 and launched.call_count == 2
    torch.testing.assert_close(found.double(), residual_norms_ref(a, u, s, v), rtol=1e-6, atol=0.0)
