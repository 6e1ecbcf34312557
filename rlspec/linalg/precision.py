"""Which arithmetic a matrix product runs in, decided by measuring rather than by the name of the processor.

Two questions are answered once per process: does oneDNN's bfloat16-split route keep float32's accuracy on this CPU
and is it faster (with AVX-512 it is both; with AMX it truly computes in bfloat16; with AVX2 alone it is slow), and are
bfloat16 products faster than float32 ones here (without bfloat16 instructions they are a hundred times slower).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# float32 products of 512 terms are off by about 2.5e-7; bfloat16 ones by 2e-3.
_FLOAT32_ERROR = 2e-6


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Run float32 matrix products by the fastest route that keeps float32 accuracy; restores the flags on exit.

    On a CPU this takes oneDNN's bfloat16-split products where a probe finds them accurate. On CUDA it keeps TF32 out.
    The flags are process-wide, so another thread's products are affected for the duration.
    """
    saved: list[tuple[Any, str]] = []
    try:
        for backend, wanted in _routes():
            saved.append((backend, backend.fp32_precision))
            backend.fp32_precision = wanted
        yield
    finally:
        for backend, value in reversed(saved):
            backend.fp32_precision = value


def _routes() -> list[tuple[Any, str]]:
    """Flag holders of this torch and the value each should have; older releases have no such flags."""
    routes: list[tuple[Any, str]] = []
    if torch.cuda.is_available() and hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        routes.append((torch.backends.cuda.matmul, "ieee"))
    if split_products_pay():
        routes.append((_mkldnn_matmul(), "bf16"))
    return routes


def _mkldnn_matmul() -> Any:
    """The holder of oneDNN's product flag, or None where this torch has none."""
    holder = getattr(torch.backends.mkldnn, "matmul", None)
    return holder if hasattr(holder, "fp32_precision") else None


@functools.cache
def split_products_are_accurate() -> bool:
    """Whether oneDNN's bfloat16-split float32 products are as accurate as float32 on this CPU."""
    backend = _mkldnn_matmul()
    if backend is None or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    # Every form in use: plain, transposed left factor, batched. Each may take a route of its own.
    a = torch.randn(2, 256, 512, generator=generator)
    b = torch.randn(2, 512, 256, generator=generator)
    truth = a.double() @ b.double()
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        forms = [torch.stack([a[0] @ b[0], a[1] @ b[1]]), a.mT.contiguous().mT @ b, torch.bmm(a, b)]
    except RuntimeError:  # a build of torch that refuses the setting
        return False
    finally:
        backend.fp32_precision = before
    worst = max(float((form - truth).norm() / truth.norm()) for form in forms)
    return worst < _FLOAT32_ERROR


@functools.cache
def split_products_pay() -> bool:
    """Whether those products are also faster than torch's default, timed once (a few milliseconds)."""
    if not split_products_are_accurate():
        return False
    backend = _mkldnn_matmul()
    a, b = torch.ones(512, 512), torch.ones(512, 512)
    default = _best_seconds(a, b)
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        return _best_seconds(a, b) < 0.9 * default
    finally:
        backend.fp32_precision = before


@functools.cache
def bfloat16_is_fast(device: str = "cpu") -> bool:
    """Whether bfloat16 matrix products beat float32 ones on ``device`` (True on every GPU, timed on a CPU)."""
    if torch.device(device).type != "cpu":
        return True
    a, b = torch.ones(256, 512), torch.ones(512, 256)
    with fast_matmul():
        single = _best_seconds(a, b)
    return _best_seconds(a.bfloat16(), b.bfloat16()) < single


def _best_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    times = []
    for _ in range(4):  # the first call sets up threads and code
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return min(times[1:])
