"""Singular vectors that an update mixes with their neighbours: told as blocks, not one by one.

Where two singular values lie closer together than what couples their vectors, each vector by itself is arbitrary:
another draw of the same noise would turn it anywhere in their common plane. The subspace that they span is not.

For values i < j of the reference the update adds, in the reference's coordinates F = Uᵀ ΔW V, the symmetric 2 x 2
problem ``[[σ_i + F_ii, c], [c, σ_j + F_jj]]`` with ``c = (F_ij + F_ji)/2``: its vectors are turned by half the angle
whose tangent is 2c over the difference of the diagonal (Jacobi's rotation). From π/8 on, where that tangent is 1, or
where the values change places, i and j are in one block, and so is everything between them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def near_degenerate(sigma: Tensor, coupling: Tensor) -> Tensor:
    """The block of each of w leading vectors.

    Args:
        sigma: reference values (L, w), descending.
        coupling: F = U1ᵀ ΔW V1, (L, w, w), float64.

    Returns:
        (L, w) int64: labels that count up from 0 along the vectors; vectors of one block share theirs.
    """
    w = sigma.shape[-1]
    moved = sigma.double() + coupling.diagonal(dim1=-2, dim2=-1)
    gap = moved.unsqueeze(-1) - moved.unsqueeze(-2)
    mixed = gap <= (coupling + coupling.mT).abs()
    index = torch.arange(w, device=sigma.device)
    # The farthest vector that i, or one before it, is mixed with.
    reach = torch.where(mixed.triu(1), index, index.unsqueeze(-1)).amax(-1)
    reach = reach.cummax(-1).values
    return torch.nn.functional.pad((reach[..., :-1] < index[1:]).cumsum(-1), (1, 0))


def block_sizes(labels: Tensor) -> Tensor:
    """(..., w) how many vectors share each vector's block."""
    counts = torch.zeros_like(labels).scatter_add_(-1, labels, torch.ones_like(labels))
    return counts.gather(-1, labels)


def split_block(labels: Tensor, k: int) -> Tensor:
    """(L,) int64: size of the block that holds both the k-th vector and the next, 0 where they are in two."""
    size = block_sizes(labels)[..., k - 1]
    if k == labels.shape[-1]:
        return torch.zeros_like(size)
    return torch.where(labels[..., k - 1] == labels[..., k], size, torch.zeros_like(size))


def block_cosines(coordinates: Tensor, labels: Tensor) -> Tensor:
    """Length of each current vector's projection onto every block of reference vectors.

    Args:
        coordinates: along the w leading reference vectors, (L, w, c).
        labels: (L, w).

    Returns:
        (L, w, c); rows past the number of blocks are zero. For a vector alone in its block it is |cos|.
    """
    squares = coordinates.double().square()
    rows = labels.unsqueeze(-1).expand_as(squares)
    return torch.zeros_like(squares).scatter_add_(-2, rows, squares).sqrt()
