"""How far triplets are from singular ones: lengths of A v - s u and Aᵀ u - s v.

Axes: ``L`` matrices, ``m`` by ``n`` each; ``k`` triplets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.ops.table import choose


def residual_norms(a: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """``max(|A v - s u|, |Aᵀ u - s v|)`` of each triplet, (L, k), in the dtype of ``a``.

    Args:
        a: (L, m, n), float32 or float64, of moderate size: no square may overflow.
        u: (L, m, k).
        s: (L, k).
        v: (L, n, k).
    """
    dtypes = a.dtype, u.dtype, s.dtype, v.dtype
    if choose("residual_norms", a.device, dtypes, (*a.shape, s.shape[-1])) == "triton":
        from rlspec.kernels.residual_norms import residual_norms_triton

        right, left = residual_norms_triton(a, v, u, s), residual_norms_triton(a.mT, u, v, s)
        return torch.maximum(right, left).to(a.dtype)
    scaled = s.unsqueeze(-2)
    return torch.maximum((a @ v - u * scaled).norm(dim=-2), (a.mT @ u - v * scaled).norm(dim=-2))
