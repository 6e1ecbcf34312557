"""Products whose factors may be rounded to bfloat16, where the hardware multiplies that several times as fast.

A factor that is as small as an update, or that an update is multiplied by, may be rounded: the error is relative to the
update. So may factors of a correction to Ritz vectors, which residuals in float32 or float64 judge afterwards. Each
entry of a product is off by some 2^-9 of the root of its terms' squares, at random, and once more by the rounding of the
result, which torch returns in bfloat16 on a CPU.

On a CPU the units are AMX, whose products take a seventh of float32's time (2232 against 332 GFLOP/s of two cores).
AVX-512's bfloat16 instructions are at most twice as fast, which the conversions eat. On a device nothing is rounded: the
kernels there choose for themselves.

``RLSPEC_PRODUCTS`` overrides the choice: ``float32`` rounds nowhere, ``bfloat16`` on every CPU, fast or not.

Axes: ``L`` matrices, ``m`` by ``n``; ``c`` columns of a block.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from rlspec.backend import cpu_capabilities, row_blocks
from rlspec.errors import OptionError

VARIABLE = "RLSPEC_PRODUCTS"
CHOICES = ("auto", "float32", "bfloat16")
# From this many entries of a matrix on (2048 by 2048) an event is faster for it: below, rounding and turning factors take
# what the products save.
_ENTRIES = 1 << 22
# Entries whose products stay in a processor's cache.
_CACHED = 1 << 17


def coarse_refusal(device: torch.device, dtype: torch.dtype, entries: int = _ENTRIES) -> str | None:
    """Why nothing is rounded in products of matrices of ``dtype`` with so many entries each, or None where it is.

    Raises:
        OptionError: ``RLSPEC_PRODUCTS`` holds an unknown name.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise OptionError(f"{VARIABLE}={choice}: unknown products; valid: {', '.join(CHOICES)}")
    if device.type != "cpu":
        return "its kernels choose for themselves"
    if dtype != torch.float32:
        return f"{str(dtype).removeprefix('torch.')} is asked for"
    if choice == "bfloat16":
        return None
    if choice == "float32":
        return f"{VARIABLE}=float32"
    if not cpu_capabilities()["amx"]:
        return "the CPU has no AMX"
    return None if entries >= _ENTRIES else "the matrices are small"


def summary(device: torch.device) -> str:
    """What becomes of factors that may be rounded, on a device: a line for `rlspec env`."""
    reason = coarse_refusal(device, torch.float32)
    return "bfloat16" if reason is None else f"float32 ({reason})"


def coarse_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, (L, m, c) float32, of a (L, m, n) and b (L, n, c), both rounded to bfloat16."""
    return (a.bfloat16() @ b.bfloat16()).float()


def coarse_rmatmul(a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ b``, (L, n, c) float32, of a (L, m, n) and b (L, m, c), c at most n, both rounded to bfloat16."""
    # A transposed left factor is up to ten times slower; the block is the smaller one to turn.
    return (b.bfloat16().mT.contiguous() @ a.bfloat16()).mT.float()


def coarse_cross(a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ b``, (L, c, c) float32, of a and b (L, m, c), rounded to bfloat16 but for its diagonal: there squares of small
    columns stand, which change what is near the identity at first order."""
    product = coarse_rmatmul(a, b)
    product.diagonal(dim1=-2, dim2=-1).copy_(_column_dots(a, b))
    return product


def coarse_symmetric(c: Tensor) -> Callable[[Tensor], Tensor]:
    """``y -> c y``, (L, n, l) float32, of a symmetric c (L, n, n), rounded once, and y, rounded each time."""
    rounded = c.bfloat16()
    return lambda y: (rounded @ y.bfloat16()).float()


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    """(L, c) float64 inner products of the columns of a and b (L, m, c), some rows at a time."""
    matrices, m, c = a.shape
    sums = torch.zeros(matrices, c, dtype=torch.float64, device=a.device)
    for rows in row_blocks(m, matrices * c, _CACHED):
        sums += (a[:, rows] * b[:, rows]).sum(-2)
    return sums
