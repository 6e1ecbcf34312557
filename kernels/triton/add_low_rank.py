"""add_low_rank: the kernel of `add_rounded` with the change formed in registers from two thin factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlspec.kernels.add_rounded import launch
from rlspec.kernels.configs import Config, Precision


def add_low_rank_triton(
    tuned: Tensor,
    left: Tensor,
    right: Tensor,
    strength: float,
    dtype: torch.dtype,
    *,
    keys: Sequence[tuple[int, int]] | None = None,
    out: Tensor | None = None,
    precision: Precision | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``tuned + strength * left rightᵀ``: left (L, m, c), right (L, n, c) float32; otherwise as `add_rounded_triton`.

    Args:
        precision: of the product, whose sums are float32: ``ieee`` or ``tf32x3``; default: what is nearest to float32
            on the device's tensor cores.
    """
    return launch(tuned, left, right, strength, dtype, keys, 0, out, precision, config)
