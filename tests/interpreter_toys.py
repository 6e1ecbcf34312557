"""What tests of kernels in the interpreter share: buffers with a halo, programs in another order, faults on
purpose."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

HALO = 1 << 13
_SENTINEL = 0x5A5A5A5A
_NO_RESERVE = 0x4000  # of Linux; mmap.MAP_NORESERVE from Python 3.13 on


def in_halo(tensor: Tensor) -> Tensor:
    """The same values inside a buffer of NaN, or of whole numbers of no meaning: a read past their ends poisons what it
    goes into."""
    halo = math.nan if tensor.is_floating_point() else _SENTINEL
    buffer = torch.full((tensor.numel() + 2 * HALO,), halo, dtype=tensor.dtype)
    view = buffer[HALO : HALO + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def whole_buffer(view: Tensor) -> Tensor:
    """The buffer of `in_halo`, halo included."""
    return torch.as_strided(view, (view.numel() + 2 * HALO,), (1,), 0)


@contextlib.contextmanager
def results_in_halo() -> Iterator[list[Tensor]]:
    """What launchers make with `torch.empty` is NaN, inside a halo of NaN; the list has all of it."""
    made: list[Tensor] = []
    empty = torch.empty

    def halo_empty(*shape: int, **options: Any) -> Tensor:
        whole = empty(*shape, **options)
        made.append(in_halo(whole.fill_(torch.nan if whole.is_floating_point() else 0)))
        return made[-1]

    with mock.patch.object(torch, "empty", halo_empty):
        yield made


def far_apart(shape: tuple[int, int, int], strides: tuple[int, int], values: Tensor) -> Tensor:
    """``values`` in memory whose entries lie more than 2^31 apart, with as much before: what is between is never touched,
    and where an offset of 32 bits wraps to lies inside."""
    before = 1 << 31
    entries = before + 1 + sum((size - 1) * stride for size, stride in zip(shape, (*strides, 1)))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, entries * values.element_size(), flags=flags)
    whole = torch.frombuffer(memory, dtype=values.dtype, count=entries)
    return whole.as_strided(shape, (*strides, 1), before).copy_(values)


def shuffle_programs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let the interpreter run the programs of every launch in an order drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = type(interpreter_builder).set_grid_idx
    orders: dict[tuple[int, int, int], list[int]] = {}

    def set_grid_idx(x: int, y: int, z: int) -> None:
        nx, ny, nz = grid = interpreter_builder.grid_dim
        if (x, y, z) == (0, 0, 0):
            orders[grid] = torch.randperm(nx * ny * nz, generator=generator).tolist()
        place = orders[grid][(x * ny + y) * nz + z]
        ordinary(interpreter_builder, place // (ny * nz), place // nz % ny, place % nz)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx, raising=False)


def assert_order_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], Tensor | Sequence[Tensor]]
) -> None:
    """What ``run`` gives has the same bits in three other orders of the programs."""

    def results() -> list[Tensor]:
        found = run()
        return [found] if isinstance(found, Tensor) else list(found)

    ordered = results()
    with monkeypatch.context() as patch:
        for seed in range(3):
            shuffle_programs(patch, seed)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(results(), ordered, strict=True))


def assert_caught(faulty: ModuleType, gates: Iterable[Callable[[ModuleType], None]]) -> None:
    """Some gate notices a faulty kernel by a wrong number, not by an exception of another kind."""
    with results_in_halo(), pytest.raises(AssertionError):
        for gate in gates:
            gate(faulty)


def with_fault(kernel: ModuleType, right: str, wrong: str, folder: Path, *imported: ModuleType) -> ModuleType:
    """The kernel's module with one piece of its text, or of that of a module it imports from, replaced: it must be there
    once."""
    texts = {module: Path(module.__file__ or "").read_text() for module in (kernel, *imported)}
    assert sum(text.count(right) for text in texts.values()) == 1, right
    faulty = {
        module.__name__: _loaded(text.replace(right, wrong), folder / f"{module.__name__}.py")
        for module, text in texts.items()
        if right in text
    }
    if kernel.__name__ in faulty:
        return faulty[kernel.__name__]
    with mock.patch.dict(sys.modules, faulty):
        return _loaded(texts[kernel], folder / "faulty.py")


def _loaded(text: str, path: Path) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("faulty", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
