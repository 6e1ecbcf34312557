"""Random numbers by counter inside a kernel: the bits that :mod:`rlspec.ops.draws` has on the host."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _philox(c0, c1, k0, k1):
    """Philox-4x64-10 of counters (c0, c1, 0, 0): four numbers of 64 bits each."""
    c2 = c0 * 0
    c3 = c0 * 0
    first = c2 + tl.full((), 0xD2E7470EE14C6C93, tl.uint64)
    second = c2 + tl.full((), 0xCA5A826395121157, tl.uint64)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(first, c0), first * c0
        high2, low2 = tl.umulhi(second, c2), second * c2
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        k1 += tl.full((), 0xBB67AE8584CAA73B, tl.uint64)
    return c0, c1, c2, c3


@triton.jit
def _halves(a, b):
    """The low, then the high halves of two tensors of 64 bits: (..., 2) each, uint32."""
    low = tl.join((a & 0xFFFFFFFF).to(tl.uint32), (b & 0xFFFFFFFF).to(tl.uint32))
    high = tl.join((a >> 32).to(tl.uint32), (b >> 32).to(tl.uint32))
    return low, high


@triton.jit
def key_of(keys):
    """The two numbers of 64 bits at a pointer to int64."""
    return tl.load(keys).to(tl.uint64, bitcast=True), tl.load(keys + 1).to(tl.uint64, bitcast=True)


@triton.jit
def eight(c0, c1, k0, k1):
    """The eight numbers of 32 bits of each counter: (..., 2, 2, 2) uint32 in their order."""
    x0, x1, x2, x3 = _philox(c0, c1, k0, k1)
    # Of eight numbers the last bit of the place is the half, those before it the word: join adds the last one.
    low02, high02 = _halves(x0, x2)
    low13, high13 = _halves(x1, x3)
    return tl.join(tl.join(low02, low13), tl.join(high02, high13))
