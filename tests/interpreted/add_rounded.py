"""add_rounded and add_low_rank in Triton's interpreter, against the CPU path to the bit and float64, and faults put into
them on purpose.

Run by tests/test_op_add_rounded.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from interpreter_toys import (
    HALO,
    assert_order_does_not_matter,
    far_apart,
    in_halo,
    results_in_halo,
    whole_buffer,
    with_fault,
)
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import rlspec
from rlspec.kernels import add_low_rank as low_rank_kernel
from rlspec.kernels import add_rounded as kernel
from rlspec.kernels import philox
from rlspec.kernels.configs import Config
from rlspec.ops.add_low_rank import LowRank, add_low_rank
from rlspec.ops.add_rounded import add_rounded
from rlspec.ops.draws import Draws
from rlspec.ops.reference import add_low_rank_ref, add_rounded_ref

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((1, 1, 1), (2, 17, 41), (1, 40, 70))
TILES = (Config(16, 16, 16, 4, 1), Config(32, 64, 32, 4, 1), Config(64, 32, 16, 4, 1))
PAIRS = ((BF16, BF16), (F16, F16), (F32, F32), (F32, BF16), (BF16, F32))
KEYS = ((5, -7), (-(1 << 63), (1 << 63) - 1))


def weights(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W with zeros, subnormal numbers and both signs in it, and changes of every size beside a unit in the last place,
    exact ties among them."""
    generator = torch.Generator().manual_seed(0)
    tuned = torch.randn(shape, generator=generator).to(dtype)
    tuned.view(-1)[::7] = 0.0
    tuned.view(-1)[3::11] = torch.finfo(dtype).smallest_normal / 4
    unit = (torch.nextafter(tuned, torch.full_like(tuned, torch.inf)).double() - tuned.double()).abs()
    sizes = torch.tensor([0.0, 0.25, -0.5, 0.5, 1.5, -3.0, 40.3, -0.26])
    change = unit * sizes[torch.randint(0, 8, shape, generator=generator)]
    return tuned, change.float()


def to_the_bit(module: ModuleType, shapes: Any = SHAPES, tiles: Any = TILES, pairs: Any = PAIRS) -> None:
    """Stored changes: the bits and the sums of the CPU path, to nearest and at random."""
    for shape in shapes:
        for dtype, to in pairs:
            tuned, change = weights(shape, dtype)
            for keys in (None, KEYS[: shape[0]]):
                for config in tiles:
                    found, sums = module.add_rounded_triton(
                        in_halo(tuned), in_halo(change), 0.7, to, keys=keys, first=3, config=config
                    )
                    for i in range(shape[0]):
                        draws = None if keys is None else Draws(keys[i])
                        truth, told = add_rounded(tuned[i], change[i], 0.7, to, draws=draws, first=3)
                        assert torch.equal(found[i].view(torch.uint8), truth.view(torch.uint8))
                        wanted = (told.change_sq, told.lost_sq, told.tuned_sq, told.entries_changed)
                        assert sums[i].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-300)


def low_rank(module: ModuleType, tiles: Any = TILES) -> None:
    """Changes of factors: float32 results against float64, and the sums against the result itself."""
    generator = torch.Generator().manual_seed(1)
    for (matrices, m, n), c in zip(SHAPES, (1, 33, 7), strict=True):
        tuned = torch.randn(matrices, m, n, generator=generator)
        left, right = (torch.randn(matrices, side, c, generator=generator) for side in (m, n))
        exact = add_low_rank_ref(tuned, left, right, 0.5)
        bar = (c + 3) * 2.0**-24 * (left.abs().double() @ right.abs().double().mT + tuned.abs())
        for config in tiles:
            with mock.patch.object(low_rank_kernel, "launch", module.launch):
                found, sums = low_rank_kernel.add_low_rank_triton(
                    in_halo(tuned), in_halo(left), in_halo(right), 0.5, F32, config=config
                )
            assert bool(((found.double() - exact).abs() <= bar).all())  # false for NaN
            moved = found.double() - tuned.double()
            assert sums[:, 3].tolist() == [float(x.count_nonzero()) for x in moved]
            assert sums[:, 0].tolist() == pytest.approx(moved.square().sum((1, 2)).tolist(), rel=1e-4)


def writes_stay_inside(module: ModuleType) -> None:
    tuned, change = weights(SHAPES[1], BF16)
    with results_in_halo() as made:
        found, _ = module.add_rounded_triton(tuned, change, 1.0, BF16, config=TILES[1])
    assert found is made[0] and len(made) == 2
    for tensor in made:
        assert not tensor.isnan().any() and whole_buffer(tensor).isnan().sum() == 2 * HALO


def offsets_have_64_bits(module: ModuleType) -> None:
    for shape, strides in (((3, 5, 7), (1 << 30, 8)), ((1, 40, 7), (1 << 32, 1 << 26))):
        tuned, change = weights(shape, BF16)
        truth, _ = module.add_rounded_triton(tuned, change, 1.0, BF16, config=TILES[1])
        far = far_apart(shape, strides, tuned)
        # It copies whole buffers back onto themselves, gigabytes here.
        with mock.patch.object(GridExecutor, "_restore_args_dev"):
            module.add_rounded_triton(far, change, 1.0, BF16, out=far, config=TILES[1])
        assert torch.equal(far, truth)


GATES: tuple[Callable[[ModuleType], None], ...] = (
    writes_stay_inside,
    lambda module: to_the_bit(module, SHAPES[1:2], TILES[:2], PAIRS[:4]),
    lambda module: low_rank(module, TILES[:2]),
    offsets_have_64_bits,
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_bits_and_sums_are_the_cpu_paths(pair: tuple[torch.dtype, torch.dtype]) -> None:
    to_the_bit(kernel, pairs=(pair,))


def test_to_nearest_is_the_nearest_neighbour() -> None:
    tuned, change = weights(SHAPES[2], BF16)
    found, _ = kernel.add_rounded_triton(tuned, change, 1.0, BF16)
    assert torch.equal(found[0], add_rounded_ref(tuned[0], change[0], 1.0, BF16))


@pytest.mark.usefixtures("poisoned_memory")
def test_low_rank_changes_against_float64() -> None:
    low_rank(kernel)


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


def test_offsets_have_64_bits() -> None:
    offsets_have_64_bits(kernel)


def test_in_place_is_out_of_place() -> None:
    tuned, change = weights(SHAPES[1], BF16)
    truth, sums = kernel.add_rounded_triton(tuned, change, 1.0, BF16, keys=KEYS)
    found, again = kernel.add_rounded_triton(tuned, change, 1.0, BF16, keys=KEYS, out=tuned)
    assert found is tuned and torch.equal(found, truth) and torch.equal(sums, again)


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, change = weights(SHAPES[2], BF16)
    left, right = torch.randn(1, 40, 20), torch.randn(1, 70, 20)

    def run() -> list[Tensor]:
        stored = kernel.add_rounded_triton(tuned, change, 1.0, BF16, keys=KEYS[:1], config=TILES[0])
        return [*stored, *low_rank_kernel.add_low_rank_triton(tuned, left, right, 1.0, BF16, config=TILES[0])]

    assert_order_does_not_matter(monkeypatch, run)


FAULTS = {
    "stores outside": ("result, mask=inside", "result, mask=(row < M)[:, None]"),
    "32-bit matrix": ("tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    "32-bit row": ("(tile // column_tiles).to(tl.int64)", "(tile // column_tiles)"),
    "inner mask one too far": ("within = inner < C - start", "within = inner < C - start + 1"),
    "last tile of the product left out": ("range(0, C, BK)", "range(0, C - BK + 1, BK)"),
    "strength forgotten": ("tl.load(strength) * delta", "1.0 * delta"),
    "sum in float32": ("exact = before + step", "exact = (before + step).to(tl.float32).to(tl.float64)"),
    "ties move": ("<= tl.abs(exact - found)", "< tl.abs(exact - found)"),
    "never stays": ("result = tl.where(stays, kept, nearest)", "result = nearest"),
    "truncated": ("return to_bfloat16(single, INTERP)", "return single.to(tl.bfloat16)"),
    "nine rounds": ("static_range(10)", "static_range(9)"),
    "key not moved on": ("k1 += tl.full", "k1 += 0 * tl.full"),
    "halves swapped": (
        "tl.join(low02, low13), tl.join(high02, high13)",
        "tl.join(high02, high13), tl.join(low02, low13)",
    ),
    "draws of the tile, not of the matrix": ("_uniform(row + first,", "_uniform(row,"),
    "counters of the tile": ("counter = column_tile * (BC // 8) +", "counter ="),
    "rounded away from where it should be": ("draw * gap < exact - floor", "draw * gap > exact - floor"),
    "negative numbers counted upwards": ("else (bits < 0)", "else (bits >= 0)"),
    "lost is not what was lost": ("lost = moved - step", "lost = moved"),
    "unchanged entries counted": ("(inside & (moved != 0.0))", "(inside & (moved == moved))"),
    "sums of the wrong tile": (
        "(matrix * tl.num_programs(0) + tile) * 4",
        "(matrix * tl.num_programs(0)) * 4",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    module = with_fault(kernel, *FAULTS[fault], tmp_path, philox)
    with pytest.raises(AssertionError):  # a wrong number, not an exception of another kind
        for gate in GATES:
            gate(module)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("draws", [None, Draws(KEYS[0])])
def test_the_public_operations_run_the_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, draws: Draws | None
) -> None:
    tuned, change = weights((1, 40, 70), dtype)
    factors = LowRank(1e-2 * torch.randn(40, 9), torch.randn(70, 9))
    on_cpu = add_rounded(tuned[0], change[0], 0.3, dtype, draws=draws)
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    launched = mock.Mock(side_effect=kernel.launch)
    monkeypatch.setattr(kernel, "launch", launched)
    monkeypatch.setattr(low_rank_kernel, "launch", launched)
    found = add_rounded(tuned[0], change[0], 0.3, dtype, draws=draws)
    assert torch.equal(found[0], on_cpu[0]) and found[1].entries_changed == on_cpu[1].entries_changed
    weight, sums = add_low_rank(tuned[0], factors, 0.3, dtype, draws=draws)
    exact = add_low_rank_ref(tuned[0], factors.left, factors.right, 0.3)
    step = torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert bool(((weight.double() - exact).abs() <= step).all())
    assert sums.frobenius == pytest.approx(float(0.3 * factors.dense().norm()), rel=1e-5)
    assert launched.call_count == 2


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_restoring_a_matrix_gives_the_cpu_paths_numbers(
    monkeypatch: pytest.MonkeyPatch, rounding: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(48, 40, generator=generator)
    tuned = base + 2e-3 * torch.randn(48, 40, generator=generator)

    def run() -> Any:
        draw = torch.Generator().manual_seed(3)
        return rlspec.restore_matrix(base, tuned, 0.2, rounding=rounding, generator=draw)

    truth = run()
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    found = run()
    change = (truth.weight.double() - tuned.double()).norm()
    assert found.method == truth.method == "delta"
    assert float((found.weight.double() - truth.weight.double()).norm()) <= 1e-4 * float(change)
    assert found.change_frobenius == pytest.approx(truth.change_frobenius, rel=1e-5)


def test_refusals() -> None:
    w = torch.zeros(1, 4, 6)
    for arguments, message in (
        ((w[0], w, 1.0, F32), "non-empty stack"),
        ((w, w.mT, 1.0, F32), "expected change"),
        ((w, w.double(), 1.0, F32), "float32"),
        ((w, w, 1.0, torch.float64), "found torch.float32 and torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.add_rounded_triton(*arguments)
    with pytest.raises(ValueError, match="a key for each"):
        kernel.add_rounded_triton(w, w, 1.0, F32, keys=KEYS)
    with pytest.raises(ValueError, match="expected right"):
        low_rank_kernel.add_low_rank_triton(w, torch.zeros(1, 4, 2), torch.zeros(1, 6, 3), 1.0, F32)
