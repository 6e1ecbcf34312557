"""gram in Triton's interpreter, against float64, and faults put into it on purpose.

Run by tests/test_op_gram.py in a process with TRITON_INTERPRET=1.
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

from rlspec.kernels import gram as kernel
from rlspec.kernels.configs import Config
from rlspec.ops.gram import gram
from rlspec.ops.reference import gram_ref

SHAPES = ((1, 1, 1), (3, 17, 33), (2, 70, 65), (1, 5, 100))
TILES = (Config(16, 16, 16, 4, 1), Config(32, 32, 32, 4, 1), Config(64, 64, 64, 4, 1))


def matrices(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def check(found: Tensor, a: Tensor) -> None:
    """``found`` is aᵀa to the rounding of float32 sums, and symmetric to the bit."""
    bar = (a.shape[-2] + 2) * 2.0**-24 * gram_ref(a.abs())
    assert bool(((found.double() - gram_ref(a)).abs() <= bar).all())  # false for NaN
    assert torch.equal(found, found.mT)


def against_the_twin(
    module: ModuleType, shapes: tuple[tuple[int, ...], ...] = SHAPES, tiles: tuple[Config, ...] = TILES
) -> None:
    for shape in shapes:
        a = matrices(shape)
        for config in tiles:
            check(module.gram_triton(in_halo(a), config=config), a)


def writes_stay_inside(module: ModuleType) -> None:
    with results_in_halo():
        found = module.gram_triton(matrices(SHAPES[1]), config=TILES[0])
    assert not found.isnan().any() and whole_buffer(found).isnan().sum() == 2 * HALO


def offsets_have_64_bits(module: ModuleType) -> None:
    for shape, strides in (((3, 5, 7), (1 << 30, 8)), ((1, 40, 7), (1 << 32, 1 << 26))):
        a = matrices(shape)
        far = far_apart((shape[0], shape[1], shape[2]), strides, a)
        for config in TILES[1:]:  # offsets pass 2^31 from one tile to the next, inside the first
            # It copies whole buffers back onto themselves, gigabytes here.
            with mock.patch.object(GridExecutor, "_restore_args_dev"):
                check(module.gram_triton(far, config=config), a)


GATES: tuple[Callable[[ModuleType], None], ...] = (
    writes_stay_inside,
    lambda module: against_the_twin(module, SHAPES[1:3], TILES[:1]),
    offsets_have_64_bits,
)


@pytest.mark.usefixtures("poisoned_memory")
def test_against_float64() -> None:
    against_the_twin(kernel)


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


def test_offsets_have_64_bits() -> None:
    offsets_have_64_bits(kernel)


def test_every_tile_of_the_triangle_is_computed_once() -> None:
    """One row of A: tile (i, j) of the result is known without a product, for more tiles than a small matrix has."""
    a = torch.arange(1.0, 16 * 40 + 1).view(1, 1, -1)
    found = kernel.gram_triton(a, config=TILES[0])
    assert torch.equal(found[0], a[0].mT * a[0])


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    a = matrices(SHAPES[2])
    assert_order_does_not_matter(monkeypatch, lambda: kernel.gram_triton(a, config=TILES[0]))


def test_nan_stays_in_its_row_and_column() -> None:
    a = matrices(SHAPES[2])
    a[1, 5, 7] = torch.nan
    found = kernel.gram_triton(a, config=TILES[0])
    assert found.isnan().sum() == 2 * 65 - 1 and bool(found[1, 7].isnan().all())


def test_transposed_views_and_slices() -> None:
    whole = matrices((2, 40, 50))
    for a in (whole.mT, whole[:, 3:20, 5:45]):
        check(kernel.gram_triton(a), a)


FAULTS = {
    "inner mask one too far": ("inner < M - start", "inner < M - start + 1"),
    "inner mask one too short": ("inner < M - start", "inner < M - start - 1"),
    "last tile left out": ("range(0, M, BK)", "range(0, M - BK + 1, BK)"),
    "no mask on stored rows": ("lower = (row < N)[:, None] &", "lower ="),
    "no mask on the turned tile": ("upper = (row < N)[None, :] &", "upper ="),
    "turned tile not turned": ("tl.trans(sums), mask=upper", "sums, mask=upper"),
    "turned tile left out": ("mask=upper", "mask=upper & (row < 0)[None, :]"),
    "diagonal tile not mended": ("row[:, None] >= column[None, :]", "row[:, None] > column[None, :]"),
    "root not mended": ("i = tl.where(i * (i + 1) // 2 > p, i - 1, i)", "i += 1"),
    "32-bit matrix": ("tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    "32-bit inner": ("inner = tl.arange(0, BK).to(tl.int64)", "inner = tl.arange(0, BK)"),
    "32-bit step": ("tl.cast(a_row, tl.int64) * BK", "a_row * BK"),
    "sums of the last tile alone": ("tl.trans(left), right, sums, input_p", "tl.trans(left), right, input_p"),
    "products in bfloat16": (
        "tl.trans(left), right, sums",
        "tl.trans(left).to(tl.bfloat16).to(tl.float32), right, sums",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    assert_caught(with_fault(kernel, *FAULTS[fault], tmp_path), GATES)


@pytest.mark.parametrize(
    ("a", "config", "message"),
    [
        (torch.zeros(3, 4), None, "non-empty float32 stack"),
        (torch.zeros(1, 0, 4), None, "non-empty"),
        (torch.zeros(1, 3, 4, dtype=torch.float64), None, "float64"),
        (torch.zeros(1, 3, 4), Config(16, 32, 16, 4, 1), "square tiles"),
    ],
)
def test_refusals(a: Tensor, config: Config | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.gram_triton(a, config=config)


def test_the_public_operation_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    launched = mock.Mock(side_effect=kernel.gram_triton)
    monkeypatch.setattr(kernel, "gram_triton", launched)
    for shape in ((4, 6), (2, 3, 17, 33)):
        check(gram(matrices(shape)), matrices(shape))
    assert launched.call_count == 2
    assert gram(matrices((4, 6)).double()).dtype == torch.float64 and launched.call_count == 2
