"""The exact engine: a full float64 SVD of every current weight. Slow, simple, and the oracle of the fast one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlspec.linalg.angles import principal_sines
from rlspec.linalg.dense import SMALL, lapack_values, thin_svd
from rlspec.perturb.coordinates import Side
from rlspec.perturb.delta import Delta
from rlspec.perturb.reference import Reference
from rlspec.spectra.blocks import block_cosines, near_degenerate, split_block
from rlspec.spectra.measurement import Measurement
from rlspec.spectra.metrics import arcsine_rounding, best_match, effective_rank
from rlspec.spectra.subspaces import Subspaces


def exact_norm(delta: Delta) -> Tensor:
    """(L,) ||ΔW||_2 on the host, from all singular values in float64."""
    return lapack_values(delta.dense().double().cpu())[..., 0]


def measure_exact(
    reference: Reference,
    delta: Delta,
    *,
    norm: Callable[[Delta], Tensor] = exact_norm,
    subspaces: bool = False,
) -> Measurement:
    """Measure a stack of weights against its references.

    Args:
        reference: factors of L matrices (m, n) with rank k >= 1.
        delta: the update of the same matrices, finite.
        norm: what takes ||ΔW||_2, which W's own decomposition does not give. By default that is a second one.
        subspaces: hand the leading subspaces back, too.

    Returns:
        A :class:`Measurement`. A weight equal to its reference has exactly the reference's values and zero
        angles. On a device the weights come to the host, whose float64 decompositions are the ones to trust.
    """
    place, reference = reference.device, reference.to("cpu")
    k = reference.k
    m, n = reference.shape
    change = delta.stats
    u, s, vh = thin_svd(delta.weight().cpu())
    same = (change.delta_frobenius == 0).unsqueeze(-1)
    s = torch.where(same, reference.S, s)
    u_ref, v_ref = reference.U.double(), reference.Vh.double().mT
    left = right = None
    if k < m:
        left = principal_sines(u_ref[..., :k], u[..., :k]).masked_fill(same, 0.0)
    if k < n:
        right = principal_sines(v_ref[..., :k], vh.mT[..., :k]).masked_fill(same, 0.0)
    e = delta.dense().double().cpu()
    w = reference.width
    block = u_ref[..., :w].mT @ e @ v_ref[..., :w]
    labels = near_degenerate(reference.S[..., :w], block)
    coordinates = u_ref.mT @ u[..., :k]
    matches = [
        best_match(cosines).clamp_max(1.0).masked_fill(same, 1.0)
        for cosines in (coordinates[..., :k, :], v_ref[..., :k].mT @ vh.mT[..., :k])
    ]
    best = block_cosines(coordinates[..., :w, :], labels).amax(-2)
    if w < coordinates.shape[-2]:
        best = torch.maximum(best, coordinates[..., w:, :].abs().amax(-2))
    zero = torch.zeros_like(change.delta_frobenius)
    backward = _backward_error(reference, s)
    angle = _angle_bound(backward, reference, s) + arcsine_rounding(
        (left, right), torch.finfo(reference.U.dtype).eps
    )
    angle = torch.where(same.squeeze(-1), zero, angle.clamp_max(math.pi / 2))
    kept = None
    if subspaces:
        sides = _coordinates(u_ref, u[..., :k], w), _coordinates(v_ref, vh.mT[..., :k], w)
        kept = Subspaces.of(reference, *sides, same.squeeze(-1), angle).to(place)
    return Measurement(
        update=change,
        sigma=s[..., :k],
        sines_left=left,
        sines_right=right,
        core=block[..., :k, :k],
        blocks=labels[..., :k],
        block_at_cut=split_block(labels, k),
        best_match_left=matches[0],
        best_match_right=matches[1],
        best_cosine=torch.where(same, torch.ones_like(best), best.clamp_max(1.0)),
        delta_spectral=norm(delta),
        effective_rank=effective_rank(s),
        effective_rank_error_bound=zero,
        sigma_error_bound=torch.where(same.squeeze(-1), zero, backward),
        angle_error_bound_rad=angle,
        engine=("exact",) * delta.shape[0],
        arithmetic=("float64",) * delta.shape[0],
        notes=(None,) * delta.shape[0],
        subspaces=kept,
    )


def _coordinates(basis: Tensor, columns: Tensor, w: int) -> Side:
    """Columns (L, dim, c) in coordinates of a basis (L, dim, r), float64; the rounding of the basis turns what it takes
    for all columns alike."""
    inside = basis.mT @ columns
    outside = columns - basis @ inside if basis.shape[-2] > basis.shape[-1] else None
    return Side(inside[..., :w, :], inside[..., w:, :], outside)


def _backward_error(reference: Reference, s: Tensor) -> Tensor:
    """(L,) norm of the perturbation that both decompositions may contain.

    LAPACK's SVD is the exact one of a matrix within a small multiple of sqrt(max(m, n)) u of the given one; by way of
    the Gram matrix that grows by σ_1/σ_k.
    """
    m, n = reference.shape
    u = torch.finfo(torch.float64).eps
    factor = torch.full_like(s[..., 0], 8.0 * math.sqrt(max(m, n)) * u)
    if min(m, n) > SMALL:
        factor = factor * s[..., 0] / s[..., reference.k - 1]
    return factor * torch.maximum(s[..., 0], reference.S[..., 0])


def _angle_bound(backward: Tensor, reference: Reference, s: Tensor) -> Tensor:
    """(L,) Wedin's bound: backward error over the gap at the cut, for both decompositions.

    Reference vectors kept in float32 are off by that rounding besides, whatever the gap: its matrix is random, and its
    spectral norm below one unit.
    """
    k = reference.k
    m, n = reference.shape
    total = torch.zeros_like(backward)
    if reference.U.dtype != torch.float64:
        total = total + torch.finfo(torch.float32).eps
    for values in (reference.S, s):
        beyond = values[..., k] if k < min(m, n) else torch.zeros_like(backward)
        gap = (values[..., k - 1] - beyond).clamp_min(torch.finfo(torch.float64).tiny)
        total = total + backward / gap
    return total
