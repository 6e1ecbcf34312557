"""Streaming to a device: order, memory and ends with a stand-in for the copies; the real ones where there is a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlspec import _C
from rlspec.io import stream as stream_module
from rlspec.io.device import CudaCopies, copies_to, pinning
from rlspec.io.index import CheckpointIndex
from rlspec.io.stream import MemoryBoundError, TensorStream, stream_pairs

COUNT, SIZE = 6, 1000


class LateCopies:
    """Copies that happen when they are waited for, as late as a GPU's may: a buffer that is given up before shows."""

    def __init__(self) -> None:
        self.under_way = 0
        self.most = 0

    def begin(self, source: Tensor) -> int:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return source.data_ptr()

    def finish(self, copy: int) -> Tensor:
        self.under_way -= 1
        return torch.frombuffer(bytearray(ctypes.string_at(copy, 4 * SIZE)), dtype=torch.float32)


class FullDevice(LateCopies):
    def begin(self, source: Tensor) -> int:
        if self.most == 2:
            raise torch.OutOfMemoryError("no room")
        return super().begin(source)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateCopies]:
    made = LateCopies()
    monkeypatch.setattr(stream_module, "copies_to", lambda device: made)
    yield made
    assert made.under_way == 0


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    tensors = {f"t{i}": torch.full((SIZE,), float(i)) for i in range(COUNT)}
    save_file(tensors, tmp_path / "model.safetensors")
    return CheckpointIndex.open(tmp_path)


def needed(index: CheckpointIndex) -> int:
    return max(_C.pool_bytes(entry.start, entry.end) for entry in index.tensors.values())


def test_every_tensor_arrives_in_order_one_copy_ahead(index: CheckpointIndex, copies: LateCopies) -> None:
    with TensorStream(index, device="cuda") as stream:
        for i, streamed in enumerate(stream):
            assert streamed.entry.name == f"t{i}"
            assert streamed.tensor.tolist() == [float(i)] * SIZE
            assert copies.under_way == (1 if i + 1 < COUNT else 0)
    assert copies.most == 2 and stream.pool.in_use == 0


def test_a_bound_of_one_tensor_is_enough(index: CheckpointIndex, copies: LateCopies) -> None:
    with TensorStream(index, device="cuda", memory_bytes=needed(index)) as stream:
        assert [float(streamed.tensor[0]) for streamed in stream] == list(range(COUNT))
        assert stream.pool.high_water <= needed(index)
    with pytest.raises(MemoryBoundError, match="t0"):
        TensorStream(index, device="cuda", memory_bytes=needed(index) - 1)


def test_pairs_and_early_ends(index: CheckpointIndex, copies: LateCopies) -> None:
    names = list(index.tensors)
    for name, base, tuned in stream_pairs(index, index, names, device="cuda"):
        assert torch.equal(base, tuned) and name == f"t{int(base[0])}"
    stream = TensorStream(index, device="cuda")
    next(stream)
    assert copies.under_way == 1
    stream.close()
    assert copies.under_way == 0 and stream.pool.in_use == 0
    assert next(stream, None) is None
    stream = TensorStream(index, device="cuda")
    next(stream)
    pool = stream.pool
    del stream
    assert copies.under_way == 0 and pool.in_use == 0


def test_a_full_device_ends_the_stream(index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read for it is gone: going on would leave a tensor out without a word."""
    monkeypatch.setattr(stream_module, "copies_to", lambda device: FullDevice())
    stream = TensorStream(index, device="cuda")
    next(stream)
    with pytest.raises(torch.OutOfMemoryError):
        next(stream)
    assert next(stream, None) is None and stream.pool.in_use == 0


def test_what_is_pinned_and_what_is_not() -> None:
    assert copies_to(torch.device("cpu")) is None
    assert not any(pinning(torch.device("cpu")))
    with pytest.raises(ValueError, match="device mps"):
        copies_to(torch.device("mps"))
    with pytest.raises(ValueError, match="go together"):
        _C.Pool(1 << 20, 1, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(index: CheckpointIndex) -> None:
    device = torch.device("cuda")
    assert isinstance(copies_to(device), CudaCopies)
    if torch.version.cuda is not None:
        assert all(pinning(device)[:3])
    for memory in (needed(index), 1 << 20):
        with TensorStream(index, device=device, memory_bytes=memory) as stream:
            for i, streamed in enumerate(stream):
                assert streamed.tensor.device.type == "cuda"
                assert streamed.tensor.tolist() == [float(i)] * SIZE
