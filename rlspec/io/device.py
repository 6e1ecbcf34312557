"""Tensors on a GPU: from pinned buffers, by copies that run while files are read and earlier tensors are used."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Copies under way beside the tensor handed out last.
_AHEAD = 1


class Copies(Protocol):
    """What copies tensors to a device."""

    def begin(self, source: Tensor) -> Any:
        """Start to copy a tensor, which stays as it is until the copy is finished."""

    def finish(self, copy: Any) -> Tensor:
        """Wait for the end of a copy and return the tensor, for use on the device's current stream."""


class CudaCopies:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)

    def begin(self, source: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            target = source.to(self._stream.device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return target, done

    def finish(self, copy: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        target, done = copy
        # The host waits: only then may the source's buffer be read into again.
        done.synchronize()
        # Allocated on the copying stream, whose next copy must not take this memory while the user's stream works on it.
        target.record_stream(torch.cuda.current_stream(self._stream.device))
        return target


def copies_to(device: torch.device) -> Copies | None:
    """What copies to a device; None for the CPU, where tensors are read already.

    Raises:
        ValueError: a device that is neither a CPU nor a CUDA (or ROCm) one.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"device {device}: tensors are streamed to cpu and cuda devices")
    return CudaCopies(device)


def pinning(device: torch.device) -> tuple[int, int, int, int]:
    """What `rlspec._C.Pool` needs to pin memory for copies to a device, or zeros where it is not to.

    They are addresses of functions of the CUDA runtime that torch has loaded, and the device's number. ROCm's copies go
    through pageable memory.
    """
    version = torch.version.cuda
    if device.type != "cuda" or version is None:
        return (0, 0, 0, 0)
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{version.split('.')[0]}")
        functions = (runtime.cudaHostRegister, runtime.cudaHostUnregister, runtime.cudaSetDevice)
    except (OSError, AttributeError):
        return (0, 0, 0, 0)
    pin, unpin, choose = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return (pin, unpin, choose, device.index if device.index is not None else torch.cuda.current_device())


class CopyQueue(Generic[T]):
    """Copies under way, handed out in the order they were begun. It keeps what they copy from."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._under_way: deque[tuple[T, Tensor, Any]] = deque()

    def next(self, read: Callable[[], tuple[T, Tensor] | None]) -> tuple[T, Tensor] | None:
        """The next tensor on the device; None after the last.

        Args:
            read: gives the next label and tensor, or None where there is none now. It is asked ahead.
        """
        while len(self._under_way) <= _AHEAD:
            found = read()
            if found is None:
                break
            label, source = found
            self._under_way.append((label, source, self._copies.begin(source)))
            del found, source
        if not self._under_way:
            return None
        label, _source, copy = self._under_way.popleft()
        return label, self._copies.finish(copy)

    def __len__(self) -> int:
        return len(self._under_way)

    def close(self) -> None:
        """Wait for what is under way, so that its buffers may go."""
        while self._under_way:
            _, _source, copy = self._under_way.popleft()
            self._copies.finish(copy)

    def __del__(self) -> None:
        self.close()
