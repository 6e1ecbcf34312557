"""signs: a sketch of ±1 drawn by counter, a bit an entry.

Kernels that multiply a sketch spread the bits in registers: it is read as a thirty-second of its size, and is nowhere
stored as numbers. Drawn anew by each program that multiplies it, it would take twice the registers of the product.

    L: matrices, (n, c) each   B: counters of a program
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from rlspec.kernels.philox import eight, key_of

_BLOCK = 128


@triton.jit
def _signs_kernel(
    key,  # (2,) int64
    out,  # (L, counters, 8) int32, contiguous
    counters,  # of a matrix
    B: tl.constexpr,
):
    # 64 bits throughout: a stack of a model's matrices passes 2^31 entries.
    matrix = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    k0, k1 = key_of(key)
    counter = place.to(tl.uint64)
    numbers = tl.reshape(eight(counter, counter * 0 + matrix.to(tl.uint64), k0, k1), (B, 8))
    at = out + (matrix * counters + place[:, None]) * 8 + tl.arange(0, 8)[None, :]
    tl.store(at, numbers.to(tl.int32, bitcast=True), mask=(place < counters)[:, None])


def signs_triton(
    key: tuple[int, int], shape: tuple[int, int, int], device: torch.device, *, block: int = _BLOCK
) -> Tensor:
    """The bits of :class:`rlspec.ops.draws.Signs`, 1 for -1.

    Args:
        key: two numbers of 64 bits, as signed ones.
        shape: (L, n, c), none of it zero, L at most 65535.
        device: one GPU (or the CPU under Triton's interpreter).
        block: counters that a program draws, a power of two.

    Returns:
        (L, ceil(n / 32), 8 ceil(c / 8)) int32: 32 rows a number, the first in the lowest bit.
    """
    matrices, n, columns = shape
    blocks, counters = triton.cdiv(n, 32), triton.cdiv(columns, 8)
    out = torch.empty(matrices, blocks, counters * 8, dtype=torch.int32, device=device)
    words = torch.tensor(key, dtype=torch.int64).to(device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _signs_kernel[(triton.cdiv(blocks * counters, block), matrices)](
            words, out, blocks * counters, B=block
        )
    return out
