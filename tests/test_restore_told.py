"""Errors of a restored matrix against float64, beside what is told of them: the estimate, and the output's rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlspec import restore_matrix


class Told(NamedTuple):
    error: float  #: ||W - truth||_F
    estimate: float  #: of the error before rounding
    rounding: float  #: ||rounding to the dtype||_F


def spiked(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A base with one value far above the rest, and the same with that value 5 % larger and a little noise."""
    draw = torch.Generator().manual_seed(seed)
    m, n = (int(torch.randint(24, 120, (1,), generator=draw)) for _ in range(2))
    size, noise = (10 ** float(torch.rand(1, generator=draw)) for _ in range(2))
    r = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(dim, r, generator=draw, dtype=torch.float64)).Q for dim in (m, n))
    values = torch.rand(r, generator=draw, dtype=torch.float64).sort(descending=True).values
    values[0] = 10 * size
    base = (u * values) @ v.T
    added = torch.randn(m, n, generator=draw, dtype=torch.float64) * 1e-5 * noise / max(m, n) ** 0.5
    tuned = base + 0.05 * values[0] * torch.outer(u[:, 0], v[:, 0]) + added
    return base.to(dtype), tuned.to(dtype)


def told(seed: int, k: int, dtype: torch.dtype) -> Told:
    base, tuned = spiked(seed, dtype)
    found = restore_matrix(base, tuned, k)
    u_ref, _, vh_ref = torch.linalg.svd(base.double(), full_matrices=False)
    u, s, vh = torch.linalg.svd(tuned.double(), full_matrices=False)
    # Pairs of the reference's vectors are free up to one sign for both, which no product sees.
    truth = tuned.double() - (u[:, :k] * s[:k]) @ vh[:k] + (u_ref[:, :k] * s[:k]) @ vh_ref[:k]
    error = float((found.weight.double() - truth).norm())
    return Told(error, found.error_estimate, found.rounding_share * found.change_frobenius)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_estimate_and_rounding_make_up_the_whole_error(k: int, dtype: torch.dtype) -> None:
    for each in (told(seed, k, dtype) for seed in range(24)):
        assert each.error <= 1.001 * math.hypot(each.estimate, each.rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_estimate_alone_would_not_cover_it(dtype: torch.dtype) -> None:
    # A spike whose value shifts leaves so little to turn that the output's rounding is a good part of it.
    assert any(each.error > 2 * each.estimate for each in (told(seed, 1, dtype) for seed in range(24)))
