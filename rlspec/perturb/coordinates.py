"""A candidate for the leading singular subspaces of W = W_ref + E, held in coordinates of the reference.

Axes: ``L`` matrices (m, n), r = min(m, n); ``w`` >= k columns (k followed, the rest a guard band).
With the complete reference factors U (m, r) and V (n, r), a right basis is ``V c + o``: coordinates ``c``
(r, w) and, where n > r, a part ``o`` (n, w) outside the range of V; the left one likewise. Small rotations
are then small coordinates, products with W become products with S and with E, and every rounding error is
relative to E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.linalg.coarse import coarse_matmul
from rlspec.linalg.dense import core_svd, on_host, singular_values, small_gram, values_of_gram
from rlspec.linalg.products import product, transposed_product
from rlspec.linalg.workers import by_matrix
from rlspec.perturb.batch import put, take
from rlspec.perturb.delta import Delta
from rlspec.perturb.reference import Reference


@dataclass(frozen=True)
class Side:
    """One basis in reference coordinates.

    ``lead`` (L, w, c) float64: along the leading w reference vectors. These entries are near the
    identity's, and float32 would round the singular values with them. ``tail`` (L, r - w, c) and
    ``outside`` (L, dim, c; None where the reference vectors span everything) are as small as the rotation,
    and stay in the dtype of the factors. ``standard`` says that ``lead`` is the identity.
    """

    lead: Tensor
    tail: Tensor
    outside: Tensor | None
    standard: bool = False

    def __matmul__(self, right: Tensor) -> Side:
        return self.times(right.double(), right.to(self.tail.dtype))

    def times(self, right: Tensor, narrow: Tensor, *, coarse: bool = False) -> Side:
        """The columns times ``right``, given in float64 and in the dtype of the factors.

        Args:
            coarse: round what is small, and ``narrow``, to bfloat16.
        """
        multiply = coarse_matmul if coarse else torch.matmul
        outside = None if self.outside is None else multiply(self.outside, narrow)
        return Side(right if self.standard else self.lead @ right, multiply(self.tail, narrow), outside)

    def __sub__(self, other: Side) -> Side:
        outside = None if self.outside is None or other.outside is None else self.outside - other.outside
        return Side(self.lead - other.lead, self.tail - other.tail, outside)

    def dot(self, other: Side) -> Tensor:
        """Inner products of the columns, (L, c, c'), float64."""
        return self.lead.mT @ other.lead + self.rest_dot(other)

    def rest_dot(self, other: Side) -> Tensor:
        """Inner products of the parts beyond the leading coordinates, (L, c, c'), to be added to float64 ones: their sum
        is float64, a single product stays in the dtype of the factors."""
        products = self.tail.mT @ other.tail
        if self.outside is None or other.outside is None:
            return products
        return products.double() + self.outside.mT @ other.outside

    def columns(self, start: int, stop: int) -> Side:
        """Columns [start, stop), as views."""
        outside = None if self.outside is None else self.outside[..., start:stop]
        return Side(self.lead[..., start:stop], self.tail[..., start:stop], outside)

    def select(self, positions: Sequence[int]) -> Side:
        """The matrices of the given positions."""
        outside = None if self.outside is None else take(self.outside, positions)
        return Side(take(self.lead, positions), take(self.tail, positions), outside)

    def replace(self, positions: Sequence[int], other: Side) -> Side:
        """A copy with the given positions taken from another side."""
        outside = self.outside
        if outside is not None and other.outside is not None:
            outside = put(outside, positions, other.outside)
        return Side(put(self.lead, positions, other.lead), put(self.tail, positions, other.tail), outside)

    def rows(self, start: int = 0, columns: int | None = None) -> Tensor:
        """Coordinates from row ``start`` < w on, of the first ``columns``, stacked into one tensor, (L, .,
        c)."""
        return torch.cat(self.parts(start, columns), dim=-2)

    def parts(self, start: int = 0, columns: int | None = None) -> list[Tensor]:
        """The same unstacked."""
        parts = [self.lead[..., start:, :columns].to(self.tail.dtype), self.tail[..., :columns]]
        return parts if self.outside is None else [*parts, self.outside[..., :columns]]


@dataclass(frozen=True)
class Pair:
    """Orthonormal left and right bases with the core diagonal: leftᵀ W right = diag(sigma), sigma (L, w)
    float64."""

    left: Side
    right: Side
    sigma: Tensor

    def select(self, positions: Sequence[int]) -> Pair:
        """The matrices of the given positions."""
        return Pair(self.left.select(positions), self.right.select(positions), take(self.sigma, positions))

    def replace(self, positions: Sequence[int], other: Pair) -> Pair:
        """A copy with the given positions taken from another pair."""
        sigma = put(self.sigma, positions, other.sigma)
        left, right = self.left.replace(positions, other.left), self.right.replace(positions, other.right)
        return Pair(left, right, sigma)


def diagonalise(
    left: Side,
    right: Side,
    core: Tensor,
    grams: tuple[Tensor, Tensor] | None = None,
    *,
    coarse: bool = False,
) -> Pair:
    """Orthonormalise two bases and diagonalise the core between them.

    Args:
        left, right: bases of w columns, linearly independent, nearly orthonormal; where they are not, sigma is NaN.
        core: (L, w, w) leftᵀ W right, float64.
        grams: Gram matrices of both, (L, w, w) float64, where they are known already.
        coarse: turn what the bases have beyond the leading coordinates in bfloat16.
    """
    gram_left, gram_right = grams if grams is not None else (left.dot(left), right.dot(right))
    # On the host: a card may have no float64 to speak of, and its batched decompositions are loops.
    turn_left, sigma, turn_right = on_host(_diagonalising, core, gram_left, gram_right)
    turned = [
        side.times(turn, turn.to(side.tail.dtype), coarse=coarse)
        for side, turn in ((left, turn_left), (right, turn_right))
    ]
    return Pair(turned[0], turned[1], sigma)


def _diagonalising(core: Tensor, gram_left: Tensor, gram_right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turns a (L, w, w), b (L, w, w) and values sigma (L, w) with aᵀ G_l a = I, bᵀ G_r b = I, aᵀ core b = diag(sigma);
    as a, sigma, b. NaN for sigma where a basis is none: its columns depend on each other, or are not finite."""
    (lower_left, wrong_left), (lower_right, wrong_right) = map(
        torch.linalg.cholesky_ex, (gram_left, gram_right)
    )
    wrong = ((wrong_left != 0) | (wrong_right != 0) | ~core.isfinite().all(-1).all(-1))[..., None, None]
    eye = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    lower_left, lower_right = (torch.where(wrong, eye, lower) for lower in (lower_left, lower_right))
    core = core.masked_fill(wrong, 0.0)
    solve = torch.linalg.solve_triangular
    half = solve(lower_left, core, upper=False)
    small = solve(lower_right, half.mT, upper=False).mT
    u, sigma, z = core_svd(small)
    sigma = sigma.masked_fill(wrong.squeeze(-1), torch.nan)
    return solve(lower_left.mT, u, upper=True), sigma, solve(lower_right.mT, z, upper=True)


def scale(side: Side, factors: Tensor) -> Side:
    """Columns times ``factors`` (L, c) float64."""
    wide = factors.unsqueeze(-2)
    narrow = wide.to(side.tail.dtype)
    return Side(side.lead * wide, side.tail * narrow, None if side.outside is None else side.outside * narrow)


def apply(reference: Reference, delta: Delta, side: Side, *, transpose: bool = False) -> Side:
    """Coordinates of ``W x`` (left coordinates) for right columns x, or of ``Wᵀ x`` for left columns.

    Args:
        reference: factors of W_ref.
        delta: E, with products in the dtype of the factors.
        side: c columns.
    """
    u, v = reference.U, reference.Vh.mT
    if transpose:
        u, v = v, u
    w, r = side.lead.shape[-2], u.shape[-1]
    x = product(v, torch.cat([side.lead.to(v.dtype), side.tail], dim=-2))
    if side.outside is not None:
        x = x + side.outside
    moved = delta.rmatmul(x) if transpose else delta.matmul(x)
    inside = transposed_product(u, moved)
    outside = moved - u @ inside if u.shape[-2] > r else None
    lead = reference.S[..., :w, None] * side.lead + inside[..., :w, :]
    tail = reference.narrow[..., w:, None] * side.tail + inside[..., w:, :]
    return Side(lead, tail, outside)


def beyond(side: Side, k: int) -> Tensor:
    """What the first k columns have outside the reference's first k, for :func:`sines`.

    On a CPU the coordinates themselves, (L, rows, k); on a device their float64 Gram matrix, (L, k, k) or that of the
    rows where there are fewer: a tenth of the size to bring to the host, where it is decomposed.
    """
    rows = side.rows(k, k).double()
    return small_gram(rows) if rows.is_cuda else rows


def sines(outside: Tensor, k: int, *, squared: bool = False) -> Tensor:
    """Sines of the principal angles between k columns and the reference's first k, (L, k) descending.

    They are the singular values of what lies outside the reference's leading coordinates: no cosine is
    taken. Where that part has fewer rows than k, the rest are zero.

    Args:
        outside: CPU, float64, as :func:`beyond` gives it. squared: it is the Gram matrix.
    """
    if squared:
        (found,) = by_matrix(lambda gram: (values_of_gram(gram),), outside)
    else:
        found = singular_values(outside)
    if found.shape[-1] < k:
        found = torch.cat([found, found.new_zeros((*found.shape[:-1], k - found.shape[-1]))], dim=-1)
    return found[..., :k].clamp(0.0, 1.0)
