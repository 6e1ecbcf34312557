"""Between a device and the host: several results in one transfer, since each makes the host wait for all that runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import overload

import torch
from torch import Tensor


@overload
def to_host(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]: ...
@overload
def to_host(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]: ...
def to_host(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Tensors of one device as CPU tensors, float64, after a single transfer; None stays None.

    What is on the CPU already comes back as it is.
    """
    there = [t for t in tensors if t is not None]
    if not any(t.is_cuda for t in there):
        return tuple(tensors)
    packed = torch.cat([t.double().reshape(-1) for t in there]).cpu()
    stops = list(accumulate(t.numel() for t in there))
    parts = iter(
        packed[stop - t.numel() : stop].reshape(t.shape) for t, stop in zip(there, stops, strict=True)
    )
    return tuple(None if t is None else next(parts) for t in tensors)


def to_device(tensors: Sequence[Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """CPU tensors of one dtype on the device of ``like``, by a single transfer; on the CPU as they are."""
    if not like.is_cuda:
        return tuple(tensors)
    packed = torch.cat([t.reshape(-1) for t in tensors]).to(like.device)
    stops = list(accumulate(t.numel() for t in tensors))
    return tuple(
        packed[stop - t.numel() : stop].reshape(t.shape) for t, stop in zip(tensors, stops, strict=True)
    )


def index_on(positions: Sequence[int], like: Tensor) -> Tensor:
    """Positions as an int64 tensor on the device of ``like``."""
    return torch.tensor(list(positions), dtype=torch.int64, device=like.device)
