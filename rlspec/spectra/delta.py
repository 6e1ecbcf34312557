"""The delta engine: measure W = W_ref + E from the reference decomposition and products with E alone.

1. First order: the rotation of the leading w columns by an elementwise Sylvester solve, the w x w core to second
   order, a small dense SVD (``sylvester``, ``subspace``).
2. Where an estimate of the error says that this will not do, sweeps of block refinement with the same solve as
   preconditioner (``estimate``, ``refine``, ``solve``).
3. Bounds from residuals (``bounds``).
4. Where sweeps do not settle, a full decomposition measures the matrix, and the note says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlspec.perturb.batch import take
from rlspec.perturb.bounds import probe_bounds
from rlspec.perturb.coordinates import Side, sines
from rlspec.perturb.delta import Delta, UpdateStats
from rlspec.perturb.reference import Reference
from rlspec.perturb.solve import Solution, is_perturbation, solve
from rlspec.spectra.blocks import block_cosines, near_degenerate, split_block
from rlspec.spectra.exact import measure_exact
from rlspec.spectra.measurement import Measurement, combine
from rlspec.spectra.metrics import arcsine_rounding, effective_rank, effective_rank_bound

# Past this share of the reference's norm an update is no perturbation, and refinement costs more than it
# saves.
_LARGEST_UPDATE = 0.5


def measure_delta(reference: Reference, delta: Delta) -> Measurement:
    """Measure a stack of weights against its references.

    Args:
        reference: factors of L matrices (m, n) with rank k >= 1.
        delta: the update of the same matrices, finite.

    Returns:
        A :class:`Measurement` that agrees with ``measure_exact`` within the bounds it carries.
    """
    close = is_perturbation(reference, delta, _LARGEST_UPDATE)
    if bool(close.all()):
        return _perturbative(reference, delta)
    if not bool(close.any()):
        return _exactly(reference, delta)
    near, far = close.nonzero().flatten(), (~close).nonzero().flatten()
    parts = [
        (near, _perturbative(reference.select(near), delta.select(near))),
        (far, _exactly(reference.select(far), delta.select(far))),
    ]
    return combine(parts)


def _perturbative(reference: Reference, delta: Delta) -> Measurement:
    solution = solve(reference, delta)
    settled = solution.settled
    if not bool(settled.any()):
        return _exactly(reference, delta)
    kept, rest = settled.nonzero().flatten(), (~settled).nonzero().flatten()
    measured = _assemble(reference.select(kept), delta.select(kept), solution, kept)
    if rest.numel() == 0:
        return measured
    exact = _exactly(reference.select(rest), delta.select(rest))
    return combine([(kept, measured), (rest, exact)])


def _exactly(reference: Reference, delta: Delta) -> Measurement:
    note = "no small rotation: measured by a full decomposition"
    return measure_exact(reference, delta).with_notes(note)


def _assemble(reference: Reference, delta: Delta, solution: Solution, kept: Tensor) -> Measurement:
    k, change = reference.k, delta.stats
    pair, block = solution.pair.select(kept), take(solution.block, kept)
    bounds = probe_bounds(reference, solution.delta.select(kept), pair)
    m, n = reference.shape
    same = change.delta_frobenius == 0
    column = same.unsqueeze(-1)
    sigma = torch.where(column, reference.S[..., :k], pair.sigma[..., :k])
    labels = near_degenerate(reference.S[..., : block.shape[-1]], block)
    best = _best_cosine(pair.left, labels, k)
    spectrum = _whole_spectrum(reference, change, sigma)
    left = sines(pair.left, k).masked_fill(column, 0.0) if k < m else None
    right = sines(pair.right, k).masked_fill(column, 0.0) if k < n else None
    angle = (bounds.angle + arcsine_rounding((left, right), reference.U.dtype)).clamp_max(math.pi / 2)
    zero = torch.zeros_like(bounds.sigma)
    return Measurement(
        update=change,
        sigma=sigma,
        sines_left=left,
        sines_right=right,
        core=block[..., :k, :k],
        blocks=labels[..., :k],
        block_at_cut=split_block(labels, k),
        best_cosine=torch.where(column, torch.ones_like(best), best),
        delta_spectral=spectral_norm(delta),
        effective_rank=effective_rank(spectrum),
        # Scaled and true trailing values both lie within ||E|| of the reference's.
        effective_rank_error_bound=effective_rank_bound(spectrum, 2.0 * change.delta_frobenius),
        sigma_error_bound=torch.where(same, zero, bounds.sigma),
        angle_error_bound_rad=torch.where(same, zero, angle),
        engine=("delta",) * reference.S.shape[0],
        notes=(None,) * reference.S.shape[0],
    )


def _best_cosine(side: Side, labels: Tensor, k: int) -> Tensor:
    """(L, k) float64: each of the first k columns' longest projection onto a reference vector, or a leading block."""
    best = block_cosines(side.lead[..., :k], labels).amax(-2)
    if side.tail.shape[-2] > 0:
        best = torch.maximum(best, side.tail[..., :k].abs().amax(-2).double())
    return best.clamp_max(1.0)


def _whole_spectrum(reference: Reference, change: UpdateStats, sigma: Tensor) -> Tensor:
    """(L, r) the measured leading values and the reference's trailing ones, scaled to what the weight's energy leaves
    for them, at most as far as the update's norm can move them (Mirsky)."""
    k = reference.k
    tail = reference.S[..., k:]
    left_over = (change.weight_frobenius.square() - sigma.square().sum(-1)).clamp_min(0.0)
    energy = tail.square().sum(-1)
    scale = torch.where(energy > 0, left_over / energy.clamp_min(1e-300), torch.ones_like(energy)).sqrt()
    most = change.delta_frobenius / energy.sqrt().clamp_min(1e-300)
    scale = torch.minimum(torch.maximum(scale, 1.0 - most), 1.0 + most)  # 1 where nothing changed
    return torch.cat([sigma, tail * scale.unsqueeze(-1)], dim=-1)


def spectral_norm(delta: Delta, *, columns: int = 16, passes: int = 5) -> Tensor:
    """(L,) ||E||_2 by a small block Krylov space, float64; from below, right to about 1 %.

    Random matrices have the flattest spectra at the top and are the worst case.
    """
    matrices, m, n = delta.shape
    columns = min(columns, m, n)
    start = torch.randn(n, columns, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    block = start.to(dtype=delta.dtype, device=delta.device).expand(matrices, -1, -1)
    basis = []
    for _ in range(passes):
        block = torch.linalg.qr(delta.rmatmul(delta.matmul(block))).Q
        basis.append(block)
    space = torch.linalg.qr(torch.cat(basis, dim=-1)).Q if columns * passes <= n else block
    image = delta.matmul(space).double()
    return torch.linalg.eigvalsh(image.mT @ image)[..., -1].clamp_min(0.0).sqrt()
