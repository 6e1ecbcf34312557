"""Spectral norms of operators, from a small block Krylov space.

Estimates from below. Random matrices have the flattest spectra at the top and are the worst case: there they are right to
about 1 %.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlspec.linalg.dense import values_of_gram
from rlspec.linalg.transfer import to_host
from rlspec.perturb.coordinates import Pair, Side, apply, scale
from rlspec.perturb.delta import Delta
from rlspec.perturb.reference import Reference

_COLUMNS, _PASSES = 8, 6
# Directions of a Krylov space shorter than this share of the longest, squared, are damped: float32 rounds them.
_SHIFT = 1e-9


def estimated_norm(delta: Delta) -> Tensor:
    """(L,) ||E||_2 on the host, see :func:`spectral_norm`."""
    return spectral_norm(*to_host(krylov_moments(delta)))


def krylov_moments(delta: Delta) -> tuple[Tensor, Tensor]:
    """Gram matrices, (L, c, c) float64, of a small block Krylov space of EᵀE and of its image under E, see
    :func:`spectral_norm`.

    Blocks are scaled, not orthogonalised: the Gram matrix tells which of their directions are new.
    """
    matrices, m, n = delta.shape
    columns = min(_COLUMNS, m, n)
    start = _random(n, columns).to(torch.float64 if delta.dtype == torch.float64 else torch.float32)
    blocks = [(start / start.norm(dim=-2)).to(delta.device).expand(matrices, -1, -1)]
    images = [delta.matmul(blocks[0])]
    tiny = torch.finfo(start.dtype).tiny
    # A norm squared may leave the range of the dtype.
    size = images[0].norm(dim=-2, keepdim=True).clamp_min(tiny)
    for _ in range(_PASSES - 1):
        block = delta.rmatmul(images[-1] / size)
        blocks.append(block / block.norm(dim=-2, keepdim=True).clamp_min(tiny))
        images.append(delta.matmul(blocks[-1]))
    space, image = torch.cat(blocks, dim=-1).double(), torch.cat(images, dim=-1).double()
    return space.mT @ space, image.mT @ image


def spectral_norm(space: Tensor, image: Tensor) -> Tensor:
    """(L,) norm of an operator from the Gram matrices (L, c, c) float64 of a space and of its image, on the host."""
    # Blocks of little that is new make the space's Gram matrix singular to rounding: what is shorter than the shift
    # counts for less, never for more.
    longest = space.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    tiny = torch.finfo(space.dtype).tiny  # of a space of zeros, whose norm is none
    shifted = space + (_SHIFT * longest).clamp_min(tiny) * torch.eye(space.shape[-1], dtype=space.dtype)
    lower = torch.linalg.cholesky(shifted)
    half = torch.linalg.solve_triangular(lower, image, upper=False)
    core = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    return values_of_gram((core + core.mT) / 2)[..., 0]


def norm_outside(reference: Reference, delta: Delta, pair: Pair) -> Tensor:
    """(L,) on the host: ||(I - Y Yᵀ) W (I - X Xᵀ)||_2, the largest singular value of what a pair of bases X, Y leaves.

    Args:
        delta: E, with products in the dtype of the factors.
    """
    across, back = _outside(pair.left), _outside(pair.right)
    matrices, tail = pair.right.tail.shape[:2]
    w = pair.sigma.shape[-1]
    columns = min(_COLUMNS, tail)
    start = _random(w + tail, columns).to(pair.sigma.device).expand(matrices, -1, -1)
    narrow = start[..., w:, :].to(pair.right.tail.dtype)
    ambient = pair.right.outside
    nothing = None if ambient is None else ambient.new_zeros((matrices, ambient.shape[-2], columns))
    block = _unit(back(Side(start[..., :w, :], narrow, nothing)))
    blocks, images = [block], [across(apply(reference, delta, block))]
    for _ in range(_PASSES - 1):
        blocks.append(_unit(back(apply(reference, delta, _unit(images[-1]), transpose=True))))
        images.append(across(apply(reference, delta, blocks[-1])))
    return spectral_norm(*to_host([_gram(blocks), _gram(images)]))


def _gram(sides: list[Side]) -> Tensor:
    """(L, c, c) float64, summed up in float64: dependent columns must show as such."""
    found = []
    for side in sides:
        parts = [side.lead, side.tail] if side.outside is None else [side.lead, side.tail, side.outside]
        found.append(torch.cat([part.double() for part in parts], dim=-2))
    columns = torch.cat(found, dim=-1)
    return columns.mT @ columns


def _outside(basis: Side) -> Callable[[Side], Side]:
    """What columns have outside the span of an orthonormal basis."""
    return lambda side: side - basis @ basis.dot(side)


def _unit(side: Side) -> Side:
    """Columns scaled to length 1; zeros stay."""
    squares = side.lead.square().sum(-2)
    for part in (side.tail, side.outside):
        if part is not None:
            squares = squares + part.double().square().sum(-2)
    return scale(side, torch.where(squares > 0, squares.rsqrt(), 0.0))


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
