"""chebyshev_step in Triton's interpreter, against float64, and faults put into it on purpose.

Run by tests/test_op_chebyshev_step.py in a process with TRITON_INTERPRET=1.
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

from rlspec.kernels import chebyshev_step as kernel
from rlspec.kernels.configs import Config
from rlspec.kernels.signs import signs_triton
from rlspec.ops.chebyshev_step import Correction, Moments, chebyshev_step, sketch
from rlspec.ops.draws import Signs
from rlspec.ops.reference import chebyshev_step_ref

SIZES = ((1, 1, 1, 1), (3, 17, 33, 5), (2, 65, 40, 67))  # L, R, K, c
TILES = (Config(16, 16, 16, 4, 1), Config(32, 16, 64, 4, 1), Config(64, 64, 32, 4, 1))
# Steps that begin a filter: what is given as bits, and what is left out.
FIRST = (
    (("block", "current"), ("previous", "residual")),
    (("block",), ("current", "previous", "residual")),
    (("current",), ("previous", "residual")),
    (("previous",), ("residual",)),
    ((), ("previous", "residual")),
)
KEY = (5, -7)


class Given(NamedTuple):
    matrix: Tensor
    block: Tensor
    current: Tensor | None
    previous: Tensor | None
    residual: Tensor | None
    factors: Tensor


def given(sizes: tuple[int, int, int, int], *, residual: bool = True) -> Given:
    matrices, rows, inner, columns = sizes
    g = torch.Generator().manual_seed(0)
    shapes = [(rows, inner), (inner, columns), *[(rows, columns)] * 3, (4, columns)]
    tensors = [torch.randn(matrices, *shape, generator=g) for shape in shapes]
    return Given(*tensors[:4], tensors[4] if residual else None, tensors[5])


def check(found: Tensor, of: Given) -> None:
    """``found`` is the sum of four terms to the rounding of float32."""
    factors = of.factors.double().unsqueeze(-2).unbind(1)
    exact = factors[0] * (of.matrix.double() @ of.block.double())
    sizes = factors[0].abs() * (of.matrix.abs().double() @ of.block.abs().double())
    for factor, term in zip(factors[1:], (of.current, of.previous, of.residual)):
        if term is not None:
            exact, sizes = exact + factor * term.double(), sizes + (factor * term.double()).abs()
    bar = (of.matrix.shape[-1] + 6) * 2.0**-24 * sizes
    assert bool(((found.double() - exact).abs() <= bar).all())  # false for NaN


def against_float64(
    module: ModuleType,
    sizes: tuple[tuple[int, int, int, int], ...] = SIZES,
    tiles: tuple[Config, ...] = TILES,
) -> None:
    for size in sizes:
        for residual in (False, True):
            of = given(size, residual=residual)
            for config in tiles:
                halos = [t if t is None else in_halo(t) for t in of]
                check(module.chebyshev_step_triton(*halos, config=config), of)


def bits(
    module: ModuleType,
    sizes: tuple[tuple[int, int, int, int], ...] = SIZES[:2],
    tiles: tuple[Config, ...] = TILES,
) -> None:
    """Sketches of a matrix that lies either way."""
    for size in sizes:
        whole = given(size)
        for names, absent in FIRST:
            of = whole._replace(**dict.fromkeys(absent, None))
            signs = {name: Signs(KEY, tuple(getattr(of, name).shape)) for name in names}
            of = of._replace(**{name: sign.dense(of.factors) for name, sign in signs.items()})
            words = {name: signs_triton(KEY, sign.shape, of.factors.device) for name, sign in signs.items()}
            for turned in (False, True):
                halos = [t if t is None else in_halo(t) for t in of._replace(**words)]
                if turned:
                    halos[0] = in_halo(of.matrix.mT.contiguous()).mT
                for config in tiles:
                    check(module.chebyshev_step_triton(*halos, config=config), of)


def writes_stay_inside(module: ModuleType) -> None:
    with results_in_halo():
        found = module.chebyshev_step_triton(*given(SIZES[1]), config=TILES[0])
    assert not found.isnan().any() and whole_buffer(found).isnan().sum() == 2 * HALO


def offsets_have_64_bits(module: ModuleType) -> None:
    for sizes, strides in (((3, 6, 7, 7), (1 << 30, 8)), ((1, 40, 70, 7), (1 << 32, 1 << 26))):
        of = given(sizes)
        for name in of._fields[:-1]:
            near = getattr(of, name)
            far = far_apart(tuple(near.shape), strides, near)
            # It copies whole buffers back onto themselves, gigabytes here.
            with mock.patch.object(GridExecutor, "_restore_args_dev"):
                check(module.chebyshev_step_triton(*of._replace(**{name: far}), config=TILES[1]), of)
        turned = far_apart(tuple(of.matrix.mT.shape), strides, of.matrix.mT).mT
        with mock.patch.object(GridExecutor, "_restore_args_dev"):
            check(module.chebyshev_step_triton(turned, *of[1:], config=TILES[1]), of)


GATES: tuple[Callable[[ModuleType], None], ...] = (
    writes_stay_inside,
    lambda module: against_float64(module, SIZES[1:], TILES[:1]),
    lambda module: bits(module, SIZES[1:2], TILES[:1]),
    offsets_have_64_bits,
)


@pytest.mark.usefixtures("poisoned_memory")
def test_against_float64() -> None:
    against_float64(kernel)


@pytest.mark.usefixtures("poisoned_memory")
def test_sketches_are_read_as_bits() -> None:
    bits(kernel)
    bits(kernel, SIZES[2:], TILES[2:])


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


def test_offsets_have_64_bits() -> None:
    offsets_have_64_bits(kernel)


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    of = given(SIZES[2])
    assert_order_does_not_matter(monkeypatch, lambda: kernel.chebyshev_step_triton(*of, config=TILES[0]))


def test_transposed_views_and_slices() -> None:
    of = given((2, 20, 30, 9))
    wide = torch.randn(2, 20, 15, generator=torch.Generator().manual_seed(1))
    of = of._replace(matrix=of.matrix.mT.contiguous().mT, residual=wide[..., 3:12], previous=wide[..., :9])
    check(kernel.chebyshev_step_triton(*of), of)


FAULTS = {
    "inner mask one too far": ("within = inner < K - start", "within = inner < K - start + 1"),
    "inner mask one too short": ("within = inner < K - start", "within = inner < K - start - 1"),
    "last tile left out": ("range(0, K, BK)", "range(0, K - BK + 1, BK)"),
    "no mask on columns": (
        "inside = (row < R)[:, None] & (column < C)[None, :]",
        "inside = (row < R)[:, None] & (column == column)[None, :]",
    ),
    "no mask on rows": (
        "inside = (row < R)[:, None] & (column < C)[None, :]",
        "inside = (row == row)[:, None] & (column < C)[None, :]",
    ),
    "32-bit matrix": ("tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    "32-bit row": ("(tl.program_id(0) // column_tiles).to(tl.int64)", "(tl.program_id(0) // column_tiles)"),
    "32-bit step of the matrix": ("tl.cast(matrix_row, tl.int64) * BK", "matrix_row * BK"),
    "32-bit inner": ("inner = tl.arange(0, BK).to(tl.int64)", "inner = tl.arange(0, BK)"),
    "32-bit step": ("tl.cast(block_row, tl.int64) * BK", "block_row * BK"),
    "sums of the last tile alone": ("tl.dot(a, x, sums, input_p", "tl.dot(a, x, input_p"),
    "factors of the first matrix": ("factors + which * 4 * C", "factors"),
    "product not scaled": ("sums *= tl.load(factor,", "sums += 0 * tl.load(factor,"),
    "current's factor for previous": ("factor + 2 * C", "factor + C"),
    "residual left out": ("sums += tl.load(factor + 3 * C", "sums += 0 * tl.load(factor + 3 * C"),
    "current for previous": (
        "previous + which * previous_matrix + (row",
        "current + which * current_matrix + (row",
    ),
    "not turned": ("a = tl.trans(a)", "a = tl.trans(tl.trans(a))"),
    "bits of the first tile": ("block_row, start + inner", "block_row, inner"),
    "bits of the first matrix": ("_spread(block + which * block_matrix", "_spread(block"),
    "previous has the bits of the first matrix": (
        "_spread(previous + which * previous_matrix",
        "_spread(previous",
    ),
    "rows from the highest bit on": ("(row % 32)", "(31 - row % 32)"),
    "bits of 16 rows alone": ("(row // 32)", "(row // 16)"),
    "other signs": ("1.0 - 2.0 * bit.to(tl.float32)", "2.0 * bit.to(tl.float32) - 1.0"),
    "zeros and ones": ("1.0 - 2.0 * bit", "1.0 - 1.0 * bit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    assert_caught(with_fault(kernel, *FAULTS[fault], tmp_path), GATES)


def test_refusals() -> None:
    of = given((2, 4, 6, 3))
    for name in of._fields:
        for wrong in (getattr(of, name)[:1], getattr(of, name).double()):
            with pytest.raises(ValueError, match="expected "):
                kernel.chebyshev_step_triton(*of._replace(**{name: wrong}))
    with pytest.raises(ValueError, match="non-empty"):
        kernel.chebyshev_step_triton(*of._replace(matrix=torch.zeros(0, 4, 6)))
    words = signs_triton(KEY, (2, 6, 3), torch.device("cpu"))
    for name in ("block", "current", "previous"):
        with pytest.raises(ValueError, match=r"int32 on cpu, found"):
            kernel.chebyshev_step_triton(*of._replace(**{name: words[:, :, :3]}))
    with pytest.raises(ValueError, match=r"expected residual .* float32"):
        kernel.chebyshev_step_triton(*of._replace(residual=words))


@pytest.mark.parametrize("formed", [False, True])
def test_the_public_operation_runs_the_kernel(monkeypatch: pytest.MonkeyPatch, formed: bool) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    launched = mock.Mock(side_effect=kernel.chebyshev_step_triton)
    monkeypatch.setattr(kernel, "chebyshev_step_triton", launched)
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 30, 20, generator=g)
    y, before, residual = torch.randn(3, 2, 20, 9, generator=g)
    correction = Correction(residual, *torch.rand(2, 2, 1, 9, generator=g))
    edge = torch.tensor([30.0, 50.0])[:, None, None]
    c = a.double().mT @ a.double()
    apply = Moments(c.float() if formed else a.mT, formed, lambda z: pytest.fail("not by the kernel"))
    close = {"rtol": 0.0, "atol": 3e-5}
    for found, truth in (
        (chebyshev_step(apply, y, None, edge), 2 / edge.double() * (c @ y.double()) - y),
        (chebyshev_step(apply, y, before, edge), chebyshev_step_ref(c, y, before, edge)),
        (
            chebyshev_step(apply, y, before, edge, correction),
            chebyshev_step_ref(c, y, before, edge, correction),
        ),
    ):
        torch.testing.assert_close(found.double(), truth, **close)
    assert launched.call_count == 3
    drawn = Signs.of(g, (2, 20, 9))
    signs = drawn.dense(y)
    monkeypatch.setattr(Signs, "dense", lambda *_: pytest.fail("stored as numbers"))
    kept = sketch(apply, drawn, edge)
    first = chebyshev_step(apply, kept, None, edge)
    truth = 2 / edge.double() * (c @ signs.double()) - signs.double()
    torch.testing.assert_close(first.double(), truth, **close)
    second = chebyshev_step(apply, first, kept, edge)
    torch.testing.assert_close(second.double(), chebyshev_step_ref(c, first, signs, edge), **close)
    assert launched.call_count == (5 if formed else 6)  # Aᵀ(A y) takes A y from the kernel where y is bits
