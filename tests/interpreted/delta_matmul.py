"""delta_matmul in Triton's interpreter, against float64, and faults put into it on purpose.

Run by tests/test_op_delta_matmul.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import op_cases
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
from op_cases import Case
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from rlspec.kernels import delta_matmul as kernel
from rlspec.kernels.configs import Config
from rlspec.ops.delta_matmul import delta_matmul, delta_rmatmul
from rlspec.ops.reference import delta_matmul_ref, delta_ref, delta_rmatmul_ref

CASES = [case for case in op_cases.SMALL if torch.float64 not in (case.dtype, case.base_dtype)]
TILES = [Config(16, 16, 16, 4, 1), Config(32, 16, 64, 4, 1), Config(64, 64, 32, 4, 1)]


def product(module: ModuleType, transposed: bool) -> Callable[..., Tensor]:
    return module.delta_rmatmul_triton if transposed else module.delta_matmul_triton


def check(found: Tensor, e: Tensor, x: Tensor) -> None:
    """``found`` is e x to the rounding of float32: of each entry of E once, and of sums of K products."""
    inner = e.shape[-1]
    bar = (inner + 2) * 2.0**-24 * (e.abs() @ x.abs())
    assert found.dtype == torch.float32
    assert bool(((found.double() - e @ x).abs() <= bar).all())  # false for NaN


def against_the_twin(module: ModuleType, cases: list[Case] = CASES, tiles: list[Config] = TILES) -> None:
    for case in cases:
        weight, reference = (in_halo(t) for t in op_cases.pair(case))
        for transposed in (False, True):
            x = in_halo(op_cases.block(case, transposed))
            e = delta_ref(weight, reference)
            for config in tiles:
                found = product(module, transposed)(weight, reference, x, config=config)
                check(found, e.mT if transposed else e, x.double())


def in_bfloat16(module: ModuleType) -> None:
    """Products of factors rounded to nearest, summed in float32."""
    for case in (CASES[2], CASES[4]):
        weight, reference = op_cases.pair(case)
        for transposed in (False, True):
            x = op_cases.block(case, transposed)
            e = delta_ref(weight, reference).float().bfloat16().double()
            found = product(module, transposed)(weight, reference, x, precision="bf16", config=TILES[1])
            check(found, e.mT if transposed else e, x.bfloat16().double())


def writes_stay_inside(module: ModuleType) -> None:
    for transposed in (False, True):
        weight, reference = op_cases.pair(CASES[1])
        x = op_cases.block(CASES[1], transposed)
        with results_in_halo() as made:
            found = product(module, transposed)(weight, reference, x, config=TILES[1])
        assert made[-1] is found and not found.isnan().any()
        assert whole_buffer(found).isnan().sum() == 2 * HALO


def offsets_have_64_bits(module: ModuleType) -> None:
    for shape, strides in (((3, 5, 7), (1 << 30, 8)), ((1, 40, 7), (1 << 32, 1 << 26))):
        weight, reference = op_cases.pair(Case(shape, 3))
        far = [far_apart(shape, strides, t) for t in (weight, reference)]
        assert sum((size - 1) * stride for size, stride in zip(shape, strides)) >= 2**31
        for transposed in (False, True):
            x = op_cases.block(Case(shape, 3), transposed)
            e = delta_ref(weight, reference)
            for config in TILES[1:]:  # offsets pass 2^31 inside the first tile, from one tile to the next
                # It copies whole buffers back onto themselves, gigabytes here.
                with mock.patch.object(GridExecutor, "_restore_args_dev"):
                    found = product(module, transposed)(*far, x, config=config)
                check(found, e.mT if transposed else e, x.double())


GATES: tuple[Callable[[ModuleType], None], ...] = (
    writes_stay_inside,
    offsets_have_64_bits,
    in_bfloat16,
    lambda module: against_the_twin(module, CASES[1:5], TILES[:2]),
)


@pytest.mark.usefixtures("poisoned_memory")
def test_against_float64() -> None:
    against_the_twin(kernel)


@pytest.mark.usefixtures("poisoned_memory")
def test_bfloat16_products_are_of_factors_rounded_to_nearest() -> None:
    in_bfloat16(kernel)


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


def test_offsets_have_64_bits() -> None:
    offsets_have_64_bits(kernel)


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, reference = op_cases.pair(CASES[3])
    for transposed in (False, True):
        x = op_cases.block(CASES[3], transposed)
        run = partial(product(kernel, transposed), weight, reference, x, config=TILES[0])
        assert_order_does_not_matter(monkeypatch, run)


def test_columns_and_matrices_do_not_depend_on_their_neighbours() -> None:
    weight, reference = op_cases.pair(CASES[3])
    x = op_cases.block(CASES[3], False)
    together = kernel.delta_matmul_triton(weight, reference, x, config=TILES[0])
    alone = kernel.delta_matmul_triton(weight[1:], reference[1:], x[1:, :, 16:20], config=TILES[0])
    torch.testing.assert_close(alone[0], together[1, :, 16:20], rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_row_and_column() -> None:
    weight, reference = op_cases.pair(CASES[2])
    weight[1, 5, 7] = torch.nan
    found = kernel.delta_matmul_triton(weight, reference, op_cases.block(CASES[2], False), config=TILES[0])
    assert found.isnan().sum() == found.shape[-1] and bool(found[1, 5].isnan().all())


@pytest.mark.parametrize("transposed", [False, True])
def test_strided_weights_and_blocks(transposed: bool) -> None:
    """Slices of fused weights and of factors, and transposed views, as the solver hands them over."""
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 90, 20, generator=g)
    weight, reference = fused[:, 10:40], fused[:, 45:75]
    factors = torch.randn(2, 40, 30 if transposed else 20, generator=g)
    for x in (factors.mT[..., :9], factors.mT.contiguous()[..., 3:12]):
        found = product(kernel, transposed)(weight, reference, x)
        e = delta_ref(weight, reference)
        check(found, e.mT if transposed else e, x.double())


FAULTS = {
    "inner mask one too far": ("left = inner < K - start", "left = inner < K - start + 1"),
    "inner mask one too short": ("left = inner < K - start", "left = inner < K - start - 1"),
    "no mask on stored columns": (
        "sums, mask=(row < R)[:, None] & (column < C)[None, :]",
        "sums, mask=(row < R)[:, None]",
    ),
    "no mask on stored rows": (
        "sums, mask=(row < R)[:, None] & (column < C)[None, :]",
        "sums, mask=(column < C)[None, :]",
    ),
    "32-bit matrix": ("tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    "32-bit row": ("(tl.program_id(0) // column_tiles).to(tl.int64)", "(tl.program_id(0) // column_tiles)"),
    "32-bit inner": ("inner = tl.arange(0, BK).to(tl.int64)", "inner = tl.arange(0, BK)"),
    "32-bit step": ("tuned_step = tl.cast(tuned_row, tl.int64) * BK", "tuned_step = tuned_row * BK"),
    "last tile left out": ("for start in range(0, K, BK):", "for start in range(0, K - BK + 1, BK):"),
    "the reference's matrix left out": ("base += matrix * base_matrix", "base += 0 * base_matrix"),
    "the reference left out": ("e = w - w_ref", "e = w"),
    "weights rounded before they are subtracted": (
        "e = w - w_ref",
        "e = to_bfloat16(w, INTERP).to(tl.float32) - w_ref",
    ),
    "tile of columns for tile of rows": (
        "column = (tl.program_id(0) % column_tiles)",
        "column = (tl.program_id(0) // column_tiles)",
    ),
    "E truncated to bfloat16": ("e = to_bfloat16(e, INTERP)", "e = e.to(tl.bfloat16)"),
    "block not rounded": ("x = to_bfloat16(x, INTERP)", "x = x"),
    "sums of the last tile alone": ("sums = tl.dot(e, x, sums, input_p", "sums = tl.dot(e, x, input_p"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    assert_caught(with_fault(kernel, *FAULTS[fault], tmp_path), GATES)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 4, 3), (2, 4, 1)), "equal"),
        (((2, 0, 4), (2, 0, 4), (2, 4, 1)), "non-empty"),
        (((2, 3, 4), (2, 3, 4), (2, 3, 1)), "expected a block"),
        (((2, 3, 4), (2, 3, 4), (1, 4, 1)), "expected a block"),
    ],
)
def test_refusals(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.delta_matmul_triton(*(torch.zeros(shape) for shape in shapes))


def test_refuses_float64_and_a_precision_without_tiles() -> None:
    w = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="float32 block"):
        kernel.delta_matmul_triton(w, w, w.double())
    with pytest.raises(ValueError, match="precision=tf32x3: not on interpreter; valid: ieee, bf16"):
        kernel.delta_matmul_triton(w, w, w, precision="tf32x3")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_public_operations_run_the_kernel(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    launched = mock.Mock(side_effect=kernel._product)
    monkeypatch.setattr(kernel, "_product", launched)
    pair = op_cases.pair(case)
    for public, twin, transposed in (
        (delta_matmul, delta_matmul_ref, False),
        (delta_rmatmul, delta_rmatmul_ref, True),
    ):
        x = op_cases.block(case, transposed)
        found, truth = public(*pair, x), twin(*pair, x)
        e = delta_ref(*pair)
        check(found, e.mT if transposed else e, x.double())
        assert found.shape == truth.shape
    assert launched.call_count == 2
