"""How leading singular subspaces turn under W_ref + E, to first order: an elementwise Sylvester solve.

With the reference diagonal in its own coordinates, the rotation of column j towards coordinate i of the
tail solves two scalar equations: no iteration, and no gap needed inside the leading block, which a small
dense SVD takes care of.

Axes as in ``subspace``; S1 = the w leading reference values, S2 = the p = r - w others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.ops.sylvester_rotation import rotation_of_images
from rlspec.perturb.coordinates import Side
from rlspec.perturb.delta import Delta
from rlspec.perturb.reference import FLOOR, Reference


def first_order(
    reference: Reference, delta: Delta
) -> tuple[Side, Side, Tensor, tuple[Tensor, Tensor], Tensor]:
    """First-order bases and second-order core of W_ref + E.

    Args:
        delta: E, with products in the dtype of the factors.

    Returns:
        left, right: bases ``[I; Q]``, ``[I; P]`` with their outside parts.
        core: (L, w, w) float64, leftᵀ W right up to terms of third order in E.
        grams: leftᵀ left and rightᵀ right, float64.
        block: U1ᵀ E V1 (L, w, w) float64.
    """
    u, v, w = reference.U, reference.Vh.mT, reference.width
    s1, narrow1, narrow2 = reference.S[..., :w], reference.narrow[..., :w], reference.narrow[..., w:]
    m, n = reference.shape
    r = reference.S.shape[-1]
    a, b = delta.matmul(v[..., :w]), delta.rmatmul(u[..., :w])
    f, g21, p, q = rotation_of_images(u, reference.Vh, reference.S, a, b, floor=FLOOR)
    f11, f21 = f[..., :w, :], f[..., w:, :]
    scale = narrow1.unsqueeze(-2)
    left_out = (a - u @ f) / scale if m > r else None
    right_out = (b - v @ torch.cat([f11.mT, g21], dim=-2)) / scale if n > r else None
    # Sums with float64 terms are float64, whatever the dtype of the products that come in.
    block = f11.double()
    gram_left, gram_right = q.mT @ q, p.mT @ p
    core = torch.diag_embed(s1) + block
    core = core + (q.mT @ (narrow2.unsqueeze(-1) * p + f21) + g21.mT @ p)
    if left_out is not None:
        outer = left_out.mT @ left_out
        gram_left, core = gram_left.double() + outer, core + outer * s1.unsqueeze(-2)
    if right_out is not None:
        outer = right_out.mT @ right_out
        gram_right, core = gram_right.double() + outer, core + s1.unsqueeze(-1) * outer
    eye = torch.eye(w, dtype=torch.float64, device=p.device).expand(p.shape[0], w, w)
    left, right = Side(eye, q, left_out), Side(eye, p, right_out)
    return left, right, core, (eye + gram_left, eye + gram_right), block
