"""How leading singular subspaces turn under W_ref + E, to first order: an elementwise Sylvester solve.

With the reference diagonal in its own coordinates, the rotation of column j towards coordinate i of the
tail solves two scalar equations: no iteration, and no gap needed inside the leading block, which a small
dense SVD takes care of.

The core and the Gram matrices are assembled by four plain products and three elementwise steps. One kernel for them would
spare a device 6 launches of an event's 215 or more, and little else: at r = 3584 and w = 788 the products are 14 GFLOP a
matrix, and the blocks that elementwise steps write and read back are 53 MB, by arithmetic 0.2 ms and 0.02 ms on an H100.

Axes as in ``subspace``; S1 = the w leading reference values, S2 = the p = r - w others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.linalg.coarse import coarse_cross, coarse_matmul, coarse_rmatmul
from rlspec.ops.sylvester_rotation import rotation_of_images, sylvester_rotation
from rlspec.perturb.coordinates import Side
from rlspec.perturb.delta import Delta
from rlspec.perturb.reference import FLOOR, Reference


def first_order(
    reference: Reference, delta: Delta, *, coarse: bool = False
) -> tuple[Side, Side, Tensor, tuple[Tensor, Tensor], Tensor]:
    """First-order bases and second-order core of W_ref + E.

    Args:
        delta: E, with products in the dtype of the factors.
        coarse: round factors to bfloat16 (``linalg.coarse``) wherever that moves the subspaces at random by no more than
            some 2^-8 of their rotation, and the values not at all: all products but E V1 and U1ᵀ E V1.

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
    matmul, cross = (coarse_matmul, coarse_cross) if coarse else (torch.matmul, _cross)
    a = delta.matmul(v[..., :w])
    b = (delta.to(torch.bfloat16) if coarse else delta).rmatmul(u[..., :w])
    if coarse:
        f = torch.cat([u[..., :w].mT @ a, coarse_rmatmul(u[..., w:], a)], dim=-2)
        g21 = coarse_matmul(reference.Vh[..., w:, :], b)
        p, q = sylvester_rotation(reference.S[..., w:], s1, f[..., w:, :], g21, floor=FLOOR)
    else:
        f, g21, p, q = rotation_of_images(u, reference.Vh, reference.S, a, b, floor=FLOOR)
    f11, f21 = f[..., :w, :], f[..., w:, :]
    scale = narrow1.unsqueeze(-2)
    left_out = (a - matmul(u, f)) / scale if m > r else None
    right_out = (b - matmul(v, torch.cat([f11.mT, g21], dim=-2))) / scale if n > r else None
    # Sums with float64 terms are float64, whatever the dtype of the products that come in.
    block = f11.double()
    gram_left, gram_right = cross(q, q).double(), cross(p, p).double()
    core = block + (cross(q, narrow2.unsqueeze(-1) * p + f21) + cross(g21, p))
    if left_out is not None:
        outer = cross(left_out, left_out)
        gram_left, core = gram_left + outer, core + outer * s1.unsqueeze(-2)
    if right_out is not None:
        outer = cross(right_out, right_out)
        gram_right, core = gram_right + outer, core + s1.unsqueeze(-1) * outer
    for square, diagonal in ((core, s1), (gram_left, 1.0), (gram_right, 1.0)):
        square.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    eye = torch.eye(w, dtype=torch.float64, device=p.device).expand(p.shape[0], w, w)
    left, right = Side(eye, q, left_out, standard=True), Side(eye, p, right_out, standard=True)
    return left, right, core, (gram_left, gram_right), block


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a.mT @ b
