"""How far columns turn towards the tail of a reference, elementwise; alone, or where the products before it end.

Axes: ``L`` matrices (m, n), r = min(m, n); ``w`` columns, ``p`` coordinates of the tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.backend import row_blocks
from rlspec.ops.table import choose

# Entries solved at once: temporaries that stay in a processor's cache, and enough to keep a device busy.
_BLOCK, _DEVICE_BLOCK = 1 << 16, 1 << 26


def sylvester_rotation(
    tail: Tensor, leading: Tensor, left: Tensor, right: Tensor, *, floor: float
) -> tuple[Tensor, Tensor]:
    """Solve ``s2 P - Q s1 = -left`` and ``s2 Q - P s1 = -right`` elementwise.

    Args:
        tail: s2, (L, p) float64.
        leading: s1, (L, w) float64, every entry above every entry of ``tail`` up to the damping.
        left, right: (L, p, w) couplings, float32 or float64: U2ᵀ E V1 and V2ᵀ Eᵀ U1, or residuals in those coordinates.
        floor: damping: s1² - s2² counts as this share of s1² where it is less.

    Returns:
        P (right coordinates) and Q (left coordinates), each (L, p, w).
    """
    if _in_kernel(left, left.shape[-2]):
        from rlspec.kernels.sylvester_rotation import sylvester_rotation_triton

        return sylvester_rotation_triton(tail, leading, left, right, floor)
    s2 = tail.to(left.dtype).unsqueeze(-1)
    s1 = leading.to(left.dtype).unsqueeze(-2)
    least = floor * s1.square()
    most = _BLOCK if left.device.type == "cpu" else _DEVICE_BLOCK
    blocks = list(row_blocks(left.shape[-2], left.shape[0] * left.shape[-1], most))
    if len(blocks) <= 1:
        return _solved(s1, s2, left, right, least)
    p, q = (left.new_empty(left.shape) for _ in range(2))
    for rows in blocks:
        p[:, rows], q[:, rows] = _solved(s1, s2[:, rows], left[:, rows], right[:, rows], least)
    return p, q


def _solved(s1: Tensor, s2: Tensor, left: Tensor, right: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    denominator = torch.maximum((s1 - s2) * (s1 + s2), least)
    return (s2 * left + s1 * right) / denominator, (s1 * left + s2 * right) / denominator


def rotation_of_images(
    u: Tensor, vh: Tensor, values: Tensor, a: Tensor, b: Tensor, *, floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The couplings of w leading columns, and the rotation that follows from them.

    Args:
        u: (L, m, r). vh: (L, r, n). values: (L, r) float64, descending.
        a: E V1, (L, m, w). b: Eᵀ U1, (L, n, w); all but ``values`` float32 or float64 alike.
        floor: see :func:`sylvester_rotation`.

    Returns:
        Uᵀ a (L, r, w); V2ᵀ b (L, p, w), p = r - w; P and Q (L, p, w).
    """
    w = a.shape[-1]
    leading, tail = values[..., :w], values[..., w:]
    if _in_kernel(a, u.shape[-1] - w):
        from rlspec.kernels.sylvester_rotation import rotation_of_images_triton

        return rotation_of_images_triton(u, vh, values, a, b, floor)
    couplings, others = u.mT @ a, vh.mT[..., w:].mT @ b
    return couplings, others, *sylvester_rotation(tail, leading, couplings[..., w:, :], others, floor=floor)


def _in_kernel(columns: Tensor, rows: int) -> bool:
    """Whether couplings of so many rows, as many as these columns, are solved in the kernel."""
    shape = columns.shape[0], rows, columns.shape[-1]
    return choose("sylvester_rotation", columns.device, (columns.dtype,), shape) == "triton"
