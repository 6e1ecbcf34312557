"""The delta engine: measure W = W_ref + E from the reference decomposition and products with E alone.

1. First order: the rotation of the leading w columns by an elementwise Sylvester solve, the w x w core to second
   order, a small dense SVD (``sylvester``, ``subspace``).
2. Where an estimate of the error says that this will not do, sweeps of block refinement with the same solve as
   preconditioner (``estimate``, ``refine``, ``solve``).
3. Whether what was found leads (``leading``), and bounds from residuals (``bounds``).
4. Where sweeps do not settle, or what was found does not lead, a full decomposition measures the matrix, and the note
   says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.linalg.coarse import coarse_refusal
from rlspec.linalg.transfer import to_host
from rlspec.ops.gram import product_eps
from rlspec.perturb.batch import positions_of
from rlspec.perturb.bounds import residual_bounds
from rlspec.perturb.coordinates import Side, beyond, sines
from rlspec.perturb.delta import Delta, UpdateStats
from rlspec.perturb.leading import largest_outside
from rlspec.perturb.norms import estimated_norm, krylov_moments, spectral_norm
from rlspec.perturb.reference import Reference
from rlspec.perturb.solve import Solution, is_perturbation, solve
from rlspec.spectra.blocks import block_cosines, near_degenerate, split_block
from rlspec.spectra.exact import measure_exact
from rlspec.spectra.measurement import Measurement, combine
from rlspec.spectra.metrics import arcsine_rounding, best_match, effective_rank, effective_rank_bound
from rlspec.spectra.subspaces import Subspaces

# Past this share of the reference's norm an update is no perturbation, and refinement costs more than it
# saves.
_LARGEST_UPDATE = 0.5


def measure_delta(reference: Reference, delta: Delta, *, subspaces: bool = False) -> Measurement:
    """Measure a stack of weights against its references.

    Args:
        reference: factors of L matrices (m, n) with rank k >= 1.
        delta: the update of the same matrices, finite.
        subspaces: hand the leading subspaces back, too.

    Returns:
        A :class:`Measurement` that agrees with ``measure_exact`` within the bounds it carries.
    """
    close = is_perturbation(reference, delta, _LARGEST_UPDATE)
    near, far = positions_of(close), positions_of(~close)
    parts = []
    if near:
        parts += _perturbative(reference.select(near), delta.select(near), near, subspaces)
    if far:
        parts.append((far, _exactly(reference.select(far), delta.select(far), subspaces)))
    return parts[0][1] if len(parts) == 1 else combine(parts)


def _perturbative(
    reference: Reference, delta: Delta, positions: list[int], subspaces: bool
) -> list[tuple[list[int], Measurement]]:
    """Measurements of matrices with the positions that they have in the whole stack."""
    m, n = reference.shape
    coarse = coarse_refusal(reference.device, reference.U.dtype, m * n) is None
    solution = solve(reference, delta, coarse=coarse)
    kept, rest = positions_of(solution.settled), positions_of(~solution.settled)
    parts = []
    while kept:
        stack = reference.select(kept), delta.select(kept), solution.select(kept)
        found = _findings(*stack)
        if not bool(found.overtaken.any()):
            parts.append(([positions[i] for i in kept], _measurement(*stack, found, subspaces)))
            break
        overtaken = [kept[i] for i in positions_of(found.overtaken)]
        kept, rest = [i for i in kept if i not in overtaken], sorted([*rest, *overtaken])
    if rest:
        exact = _exactly(reference.select(rest), delta.select(rest), subspaces)
        parts.append(([positions[i] for i in rest], exact))
    return parts


def _exactly(reference: Reference, delta: Delta, subspaces: bool) -> Measurement:
    note = "no small rotation: measured by a full decomposition"
    return measure_exact(reference, delta, norm=estimated_norm, subspaces=subspaces).with_notes(note)


@dataclass(frozen=True)
class _Findings:
    """What a device was asked of a stack, on the host; see :class:`Measurement` for what is not told here."""

    match_left: Tensor
    match_right: Tensor
    best: Tensor
    core: Tensor
    labels: Tensor  # (L, w) int64, of near-degenerate reference vectors
    norm: Tensor  # (L,) ||E||_2
    outside: tuple[Tensor, ...]  # of each side that has angles, see ``beyond``
    largest_outside: Tensor  # (L,)
    overtaken: Tensor  # (L,) bool: pairs that are not known to lead


def _findings(reference: Reference, delta: Delta, solution: Solution) -> _Findings:
    """All but the last two leave the device in one transfer."""
    k, pair, block = reference.k, solution.pair, solution.block
    m, n = reference.shape
    labels = near_degenerate(reference.S[..., : block.shape[-1]], block)
    match_left, match_right, best, core, labels, space, image, *outside = to_host(
        [
            best_match(pair.left.lead[..., :k, :k]),
            best_match(pair.right.lead[..., :k, :k]),
            _longest_projection(pair.left, labels, k),
            block[..., :k, :k],
            labels,
            *krylov_moments(delta.to(torch.bfloat16) if solution.coarse else delta),
            *(beyond(side, k) for side, dim in ((pair.left, m), (pair.right, n)) if k < dim),
        ]
    )
    norm = spectral_norm(space, image)
    largest, overtaken = largest_outside(reference, solution.delta, pair, solution.left_over.sigma, norm)
    return _Findings(
        match_left=match_left,
        match_right=match_right,
        best=best,
        core=core,
        labels=labels.long(),
        norm=norm,
        outside=tuple(outside),
        largest_outside=largest,
        overtaken=overtaken,
    )


def _measurement(
    reference: Reference, delta: Delta, solution: Solution, found: _Findings, subspaces: bool
) -> Measurement:
    k, change = reference.k, delta.stats
    pair, left_over = solution.pair, solution.left_over
    m, n = reference.shape
    squared = reference.device.type != "cpu"
    bounds = residual_bounds(reference, left_over, change.delta_frobenius, found.largest_outside, delta.dtype)
    same = change.delta_frobenius == 0
    column = same.unsqueeze(-1)
    sigma = torch.where(column, reference.values[..., :k], left_over.sigma[..., :k])
    spectrum = _whole_spectrum(reference, change, sigma)
    angles = [sines(x, k, squared=squared).masked_fill(column, 0.0) for x in found.outside]
    left = angles[0] if k < m else None
    right = angles[-1] if k < n else None
    lost = arcsine_rounding((left, right), product_eps(reference.device, reference.U.dtype))
    angle = (bounds.angle + lost).clamp_max(math.pi / 2)
    zero = torch.zeros_like(bounds.sigma)
    angle = torch.where(same, zero, angle)
    return Measurement(
        update=change,
        sigma=sigma,
        sines_left=left,
        sines_right=right,
        core=found.core,
        blocks=found.labels[..., :k],
        block_at_cut=split_block(found.labels, k),
        best_match_left=found.match_left.clamp_max(1.0).masked_fill(column, 1.0),
        best_match_right=found.match_right.clamp_max(1.0).masked_fill(column, 1.0),
        best_cosine=found.best.clamp_max(1.0).masked_fill(column, 1.0),
        delta_spectral=found.norm,
        effective_rank=effective_rank(spectrum),
        # Scaled and true trailing values both lie within ||E|| of the reference's.
        effective_rank_error_bound=effective_rank_bound(spectrum, 2.0 * change.delta_frobenius),
        sigma_error_bound=torch.where(same, zero, bounds.sigma),
        angle_error_bound_rad=angle,
        engine=("delta",) * len(same),
        arithmetic=(_arithmetic(solution),) * len(same),
        notes=(None,) * len(same),
        subspaces=Subspaces.of(reference, pair.left, pair.right, same, angle) if subspaces else None,
    )


def _arithmetic(solution: Solution) -> str:
    return "bfloat16" if solution.coarse else str(solution.delta.dtype).removeprefix("torch.")


def _longest_projection(side: Side, labels: Tensor, k: int) -> Tensor:
    """(L, k) float64: each of the first k columns' longest projection onto a reference vector, or a leading block; its
    cosine but for rounding."""
    best = block_cosines(side.lead[..., :k], labels).amax(-2)
    if side.tail.shape[-2] > 0:
        best = torch.maximum(best, side.tail[..., :k].abs().amax(-2))
    return best


def _whole_spectrum(reference: Reference, change: UpdateStats, sigma: Tensor) -> Tensor:
    """(L, r) the measured leading values and the reference's trailing ones, scaled to what the weight's energy leaves
    for them, at most as far as the update's norm can move them (Mirsky)."""
    k = reference.k
    tail = reference.values[..., k:]
    left_over = (change.weight_frobenius.square() - sigma.square().sum(-1)).clamp_min(0.0)
    energy = tail.square().sum(-1)
    scale = torch.where(energy > 0, left_over / energy.clamp_min(1e-300), torch.ones_like(energy)).sqrt()
    most = change.delta_frobenius / energy.sqrt().clamp_min(1e-300)
    scale = torch.minimum(torch.maximum(scale, 1.0 - most), 1.0 + most)  # 1 where nothing changed
    return torch.cat([sigma, tail * scale.unsqueeze(-1)], dim=-1)
