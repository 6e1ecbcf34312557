"""signs in Triton's interpreter, against the host to the bit, and faults put into it on purpose.

Run by tests/test_op_signs.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from interpreter_toys import (
    HALO,
    assert_order_does_not_matter,
    results_in_halo,
    whole_buffer,
    with_fault,
)
from torch import Tensor

from rlspec.kernels import philox
from rlspec.kernels import signs as kernel
from rlspec.ops.draws import Signs

CPU = torch.device("cpu")
SHAPES = ((1, 1, 1), (3, 33, 9), (2, 130, 70))
KEYS = ((5, -7), (-(1 << 63), (1 << 63) - 1))


def spread(words: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """±1 from the bits of :func:`signs_triton`."""
    bits = (words.unsqueeze(2) >> torch.arange(32).view(32, 1)) & 1
    return (1.0 - 2.0 * bits).flatten(1, 2)[:, : shape[1], : shape[2]]


def to_the_bit(module: ModuleType, blocks: tuple[int, ...] = (4, 16, 128)) -> None:
    for shape in SHAPES:
        for key in KEYS:
            truth = Signs(key, shape).dense(torch.ones(1))
            for block in blocks:
                assert torch.equal(spread(module.signs_triton(key, shape, CPU, block=block), shape), truth)


def writes_stay_inside(module: ModuleType) -> None:
    with results_in_halo() as made:
        module.signs_triton(KEYS[0], SHAPES[2], CPU, block=16)
    whole = whole_buffer(made[0])
    around = torch.cat([whole[:HALO], whole[-HALO:]])
    assert (around == around[0]).all()


def test_to_the_bit() -> None:
    to_the_bit(kernel)


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_order_does_not_matter(monkeypatch, lambda: kernel.signs_triton(KEYS[0], SHAPES[2], CPU, block=4))


FAULTS = {
    "nine rounds": ("static_range(10)", "static_range(9)"),
    "one key twice": ("tl.load(keys + 1)", "tl.load(keys)"),
    "halves swapped": (
        "tl.join(low02, low13), tl.join(high02, high13)",
        "tl.join(high02, high13), tl.join(low02, low13)",
    ),
    "all matrices alike": ("counter * 0 + matrix.to(tl.uint64)", "counter * 0"),
    "a matrix one further": ("counter * 0 + matrix.to(tl.uint64)", "counter * 0 + matrix.to(tl.uint64) + 1"),
    "counters of the first program": ("counter = place.to(tl.uint64)", "counter = (place % B).to(tl.uint64)"),
    "stored without a mask": ("mask=(place < counters)[:, None]", "mask=(place >= 0)[:, None]"),
    "last counter left out": ("mask=(place < counters)[:, None]", "mask=(place < counters - 1)[:, None]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    module = with_fault(kernel, *FAULTS[fault], tmp_path, philox)
    with pytest.raises(AssertionError):  # a wrong number, not an exception of another kind
        writes_stay_inside(module)
        to_the_bit(module, (16,))
