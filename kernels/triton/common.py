"""What several kernels share: dtypes, and rounding to bfloat16 that the interpreter gets right too."""

from __future__ import annotations

from typing import Any

import torch

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def interpreted(kernel: Any) -> bool:
    """Whether a kernel runs in Triton's interpreter: it does if TRITON_INTERPRET was set when its module was imported."""
    return isinstance(kernel, InterpretedFunction)


@triton.jit
def to_bfloat16(x, INTERP: tl.constexpr):
    """float32 to bfloat16, round to nearest even; the interpreter's own cast truncates."""
    if INTERP:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)  # the carry must not turn NaN into infinity or zero
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_float64(x, INTERP: tl.constexpr):
    """Exact; the interpreter's own cast loses bfloat16's subnormal numbers."""
    if INTERP and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(tl.float64)
    else:
        return x.to(tl.float32).to(tl.float64)
