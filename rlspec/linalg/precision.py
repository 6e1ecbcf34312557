"""Which arithmetic a float32 matrix product runs in.

oneDNN can split float32 factors into bfloat16 parts. With AVX-512 that keeps float32's accuracy at twice the speed of
the default; with AMX it truly computes in bfloat16; with AVX2 alone it gains nothing. So it is taken on CPUs with
AVX-512 where a probe finds it accurate. Nothing is timed: the choice is the same in every process on a machine, and a
resumed run computes as the interrupted one did.
"""

from __future__ import annotations

import functools
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


def split_products_pay() -> bool:
    """Whether those products are accurate here, on a CPU where they are also faster."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and split_products_are_accurate()
