"""The cases that tests of :mod:`rlspec.ops` share: pairs of weights, and what they are multiplied with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A stack of pairs (W, W_ref), (L, m, n), and blocks of ``columns``."""

    shape: tuple[int, int, int]
    columns: int
    dtype: torch.dtype = torch.bfloat16
    base_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtypes = "-".join(str(d).removeprefix("torch.") for d in (self.dtype, self.base_dtype))
        return f"{'x'.join(map(str, self.shape))}-{self.columns}-{dtypes}"


F16, F32, F64 = torch.float16, torch.float32, torch.float64
#: Odd sizes, none a multiple of a tile; every pair of dtypes that comes up.
SMALL = (
    Case((1, 1, 1), 1),
    Case((3, 17, 33), 5),
    Case((2, 63, 65), 17),
    Case((2, 70, 40), 67),
    Case((2, 40, 130), 33, F32, F32),
    Case((2, 33, 47), 9, F32),
    Case((2, 33, 47), 9, F16),
    Case((1, 65, 1), 2, F16, F16),
    Case((2, 17, 33), 5, F64, F64),
    Case((2, 17, 33), 5, F64),
)


def pair(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W and W_ref; about half of the entries do not move, and the first of several matrices does not move at all."""
    g = torch.Generator().manual_seed(seed)
    reference = torch.randn(case.shape, generator=g).to(case.base_dtype)
    step = 3e-2 * torch.randn(case.shape, generator=g) * (torch.rand(case.shape, generator=g) < 0.5)
    weight = (reference.double() + step.double()).to(case.dtype)
    if case.shape[0] > 1 and case.dtype == case.base_dtype:
        weight[0] = reference[0]
    return weight, reference


def block(case: Case, transposed: bool, dtype: torch.dtype = F32, seed: int = 1) -> Tensor:
    """X (L, n, c), or Y (L, m, c) for products with Eᵀ."""
    matrices, m, n = case.shape
    g = torch.Generator().manual_seed(seed)
    return torch.randn(matrices, m if transposed else n, case.columns, generator=g, dtype=F64).to(dtype)
