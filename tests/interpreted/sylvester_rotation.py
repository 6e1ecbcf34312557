"""sylvester_rotation in Triton's interpreter, against float64, and faults put into it on purpose.

Run by tests/test_op_sylvester_rotation.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
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

from rlspec.kernels import sylvester_rotation as kernel
from rlspec.kernels.configs import Config
from rlspec.ops.reference import sylvester_rotation_ref
from rlspec.ops.sylvester_rotation import rotation_of_images, sylvester_rotation

SIZES = ((1, 1, 1, 2, 1), (3, 17, 33, 15, 5), (2, 65, 40, 40, 19))  # L, m, n, r, w
TILES = (Config(16, 16, 16, 4, 1), Config(32, 16, 64, 4, 1), Config(64, 64, 32, 4, 1))
FLOOR = 0.02
EPS = 2.0**-24


class Given(NamedTuple):
    u: Tensor
    vh: Tensor
    values: Tensor
    a: Tensor
    b: Tensor


def given(sizes: tuple[int, int, int, int, int]) -> Given:
    """Values that float32 holds, the first of the tail so close above the last that lead that it is damped."""
    matrices, m, n, r, w = sizes
    g = torch.Generator().manual_seed(0)
    values = torch.linspace(3, 1, r) + torch.rand(matrices, 1, generator=g)
    values[:, w] = values[:, w - 1] * (1 - 2.0**-12)
    u, vh, a, b = (torch.randn(matrices, *shape, generator=g) for shape in ((m, r), (r, n), (m, w), (n, w)))
    return Given(u, vh, values.double(), a, b)


def check(found: tuple[Tensor, Tensor], s2: Tensor, s1: Tensor, left: Tensor, right: Tensor) -> None:
    """The twin's numbers to the rounding of float32, beside the sizes of what is added."""
    truth = sylvester_rotation_ref(s2, s1, left, right, floor=FLOOR)
    sizes = sylvester_rotation_ref(s2, s1, left.abs(), right.abs(), floor=FLOOR)
    for mine, exact, size in zip(found, truth, sizes, strict=True):
        assert bool(((mine.double() - exact).abs() <= 8 * EPS * size).all())  # false for NaN


def of_couplings(
    module: ModuleType, sizes: tuple[tuple[int, ...], ...] = SIZES, tiles: tuple[Config, ...] = TILES
) -> None:
    for size in sizes:
        of = given(size)  # type: ignore[arg-type]
        w = of.a.shape[-1]
        g = torch.Generator().manual_seed(1)
        parts = (of.values[:, w:], of.values[:, :w], *torch.randn(2, size[0], size[3] - w, w, generator=g))
        for config in tiles:
            found = module.sylvester_rotation_triton(*map(in_halo, parts), FLOOR, config=config)
            check(found, *parts)


def of_images(
    module: ModuleType, sizes: tuple[tuple[int, ...], ...] = SIZES, tiles: tuple[Config, ...] = TILES
) -> None:
    for size in sizes:
        of = given(size)  # type: ignore[arg-type]
        for config in tiles:
            check_images(module.rotation_of_images_triton(*map(in_halo, of), FLOOR, config=config), of)


def check_images(found: tuple[Tensor, ...], of: Given) -> None:
    w = of.a.shape[-1]
    left, right, *turns = found
    for mine, x, y in ((left, of.u.mT, of.a), (right, of.vh[:, w:], of.b)):
        exact, size = x.double() @ y.double(), x.abs().double() @ y.abs().double()
        assert bool(((mine.double() - exact).abs() <= (x.shape[-1] + 2) * EPS * size).all())
    check((turns[0], turns[1]), of.values[:, w:], of.values[:, :w], left[:, w:], right)


def writes_stay_inside(module: ModuleType) -> None:
    with results_in_halo() as made:
        module.rotation_of_images_triton(*given(SIZES[1]), FLOOR, config=TILES[0])
    assert len(made) == 4
    for one in made:
        assert not one.isnan().any() and whole_buffer(one).isnan().sum() == 2 * HALO


def offsets_have_64_bits(module: ModuleType) -> None:
    for sizes, strides in (((3, 7, 7, 7, 3), (1 << 30, 8)), ((1, 70, 70, 40, 7), (1 << 32, 1 << 26))):
        of = given(sizes)
        for name in ("u", "vh", "a", "b"):
            near = getattr(of, name)
            far = of._replace(**{name: far_apart(tuple(near.shape), strides, near)})
            # It copies whole buffers back onto themselves, gigabytes here.
            with mock.patch.object(GridExecutor, "_restore_args_dev"):
                check_images(module.rotation_of_images_triton(*far, FLOOR, config=TILES[1]), of)
        w = of.a.shape[-1]
        parts = [of.values[:, w:], of.values[:, :w], *torch.randn(2, sizes[0], sizes[3] - w, w)]
        for place in (2, 3):
            far_parts = list(parts)
            far_parts[place] = far_apart(tuple(parts[place].shape), strides, parts[place])
            with mock.patch.object(GridExecutor, "_restore_args_dev"):
                check(module.sylvester_rotation_triton(*far_parts, FLOOR, config=TILES[1]), *parts)


GATES: tuple[Callable[[ModuleType], None], ...] = (
    writes_stay_inside,
    lambda module: of_couplings(module, SIZES[1:], TILES[:1]),
    lambda module: of_images(module, SIZES[1:], TILES[:1]),
    offsets_have_64_bits,
)


@pytest.mark.usefixtures("poisoned_memory")
def test_of_couplings() -> None:
    of_couplings(kernel)


@pytest.mark.usefixtures("poisoned_memory")
def test_of_images() -> None:
    of_images(kernel)


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


def test_offsets_have_64_bits() -> None:
    offsets_have_64_bits(kernel)


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    of = given(SIZES[2])
    assert_order_does_not_matter(
        monkeypatch, lambda: kernel.rotation_of_images_triton(*of, FLOOR, config=TILES[0])
    )


FAULTS = {
    "inner mask of U one too far": ("(inner < M - start)", "(inner < M - start + 1)"),
    "inner mask of V one too short": ("inner < N - start", "inner < N - start - 1"),
    "last tile of U left out": ("range(0, M, BK)", "range(0, M - BK + 1, BK)"),
    "last tile of V left out": ("range(0, N, BK)", "range(0, N - BK + 1, BK)"),
    "no mask on columns": (
        "inside = (row < R)[:, None] & (column < C)[None, :]",
        "inside = (row < R)[:, None] & (column == column)[None, :]",
    ),
    "32-bit matrix": ("tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    "32-bit row": ("(tl.program_id(0) // column_tiles).to(tl.int64)", "(tl.program_id(0) // column_tiles)"),
    "32-bit inner": ("inner = tl.arange(0, BK).to(tl.int64)", "inner = tl.arange(0, BK)"),
    "32-bit step of U": ("tl.cast(u_row, tl.int64) * BK", "u_row * BK"),
    "32-bit step of A": ("tl.cast(a_row, tl.int64) * BK", "a_row * BK"),
    "32-bit step of B": ("tl.cast(b_row, tl.int64) * BK", "b_row * BK"),
    "sums of the last tile alone": ("tl.dot(factor, block, y, input_p", "tl.dot(factor, block, input_p"),
    "values of the first matrix": ("tail + which * tail_matrix", "tail"),
    "leading values of the first matrix": ("leading + which * leading_matrix", "leading"),
    "not damped": ("tl.maximum((s1 - s2) * (s1 + s2), floor * (s1 * s1))", "((s1 - s2) * (s1 + s2))"),
    "difference of squares": ("(s1 - s2) * (s1 + s2)", "s1 * s1 - s2 * s2"),
    "sides exchanged": ("(s2 * x + s1 * y)", "(s1 * x + s2 * y + 0 * y)"),
    "another sign": ("(s1 * x + s2 * y)", "(s1 * x - s2 * y)"),
    "couplings not kept": ("tl.store(right_at, y, mask=inside)", "tl.store(right_at, x, mask=inside)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    assert_caught(with_fault(kernel, *FAULTS[fault], tmp_path), GATES)


def test_refusals() -> None:
    of = given((2, 4, 6, 4, 3))
    for name in of._fields:
        for wrong in (getattr(of, name)[:1], getattr(of, name).half()):
            with pytest.raises(ValueError, match="expected "):
                kernel.rotation_of_images_triton(*of._replace(**{name: wrong}), FLOOR)
    with pytest.raises(ValueError, match="0 < w < r"):
        kernel.rotation_of_images_triton(*of._replace(a=of.u), FLOOR)
    parts = (of.values[:, 3:], of.values[:, :3], torch.ones(2, 1, 3), torch.ones(2, 1, 3))
    for place in range(4):
        with pytest.raises(ValueError, match="expected "):
            kernel.sylvester_rotation_triton(*parts[:place], parts[place][:1], *parts[place + 1 :], FLOOR)
    with pytest.raises(ValueError, match="non-empty"):
        kernel.sylvester_rotation_triton(*parts[:2], torch.ones(2, 0, 3), torch.ones(2, 0, 3), FLOOR)


def test_the_public_operations_run_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    launched = mock.Mock(side_effect=kernel._launch)
    monkeypatch.setattr(kernel, "_launch", launched)
    of = given(SIZES[1])
    found = rotation_of_images(*of, floor=FLOOR)
    check_images(found, of)
    turned = of._replace(u=of.u.mT.contiguous().mT, b=of.b.mT.contiguous().mT)  # no layout is asked for
    assert all(
        torch.equal(x, y) for x, y in zip(rotation_of_images(*turned, floor=FLOOR), found, strict=True)
    )
    parts = (of.values[:, 5:], of.values[:, :5], found[0][:, 5:], found[1])
    check(sylvester_rotation(*parts, floor=FLOOR), *parts)
    assert launched.call_count == 3
