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

from rlspec.spectra.batch import take
from rlspec.spectra.blocks import block_cosines, near_degenerate, split_block
from rlspec.spectra.bounds import probe_bounds
from rlspec.spectra.exact import measure_exact
from rlspec.spectra.measurement import Measurement, ReferenceStack, combine
from rlspec.spectra.metrics import Update, arcsine_rounding, effective_rank, effective_rank_bound, update
from rlspec.spectra.solve import Solution, is_perturbation, solve
from rlspec.spectra.subspace import Side, sines

# Past this share of the reference's norm an update is no perturbation, and refinement costs more than it
# saves.
_LARGEST_UPDATE = 0.5


def measure_delta(reference: ReferenceStack, weight: Tensor) -> Measurement:
    """Measure a stack of weights against its references.

    Args:
        reference: factors of L matrices (m, n) with rank k >= 1.
        weight: (L, m, n), any floating dtype, finite.

    Returns:
        A :class:`Measurement` that agrees with ``measure_exact`` within the bounds it carries.
    """
    change = update(weight, reference.W)
    close = is_perturbation(reference, change, _LARGEST_UPDATE)
    if bool(close.all()):
        return _perturbative(reference, weight, change)
    if not bool(close.any()):
        return _exactly(reference, weight)
    near, far = close.nonzero().flatten(), (~close).nonzero().flatten()
    parts = [
        (near, _perturbative(reference.select(near), weight[near], change.select(near))),
        (far, _exactly(reference.select(far), weight[far])),
    ]
    return combine(parts)


def _perturbative(reference: ReferenceStack, weight: Tensor, change: Update) -> Measurement:
    solution = solve(reference, change)
    settled = solution.settled
    if not bool(settled.any()):
        return _exactly(reference, weight)
    kept, rest = settled.nonzero().flatten(), (~settled).nonzero().flatten()
    measured = _assemble(reference.select(kept), change.select(kept), solution, kept)
    if rest.numel() == 0:
        return measured
    exact = _exactly(reference.select(rest), weight[rest])
    return combine([(kept, measured), (rest, exact)])


def _exactly(reference: ReferenceStack, weight: Tensor) -> Measurement:
    note = "no small rotation: measured by a full decomposition"
    return measure_exact(reference, weight, norm=spectral_norm).with_notes(note)


def _assemble(reference: ReferenceStack, change: Update, solution: Solution, kept: Tensor) -> Measurement:
    k = reference.k
    pair, block = solution.pair.select(kept), take(solution.block, kept)
    bounds = probe_bounds(reference, take(solution.delta, kept), pair)
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
        delta_spectral=spectral_norm(change.delta),
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


def _whole_spectrum(reference: ReferenceStack, change: Update, sigma: Tensor) -> Tensor:
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


def spectral_norm(a: Tensor, *, columns: int = 16, passes: int = 5) -> Tensor:
    """||A||_2 of (L, m, n) by a small block Krylov space, float64; from below, right to about 1 %.

    Random matrices have the flattest spectra at the top and are the worst case.
    """
    work = a if a.dtype == torch.float64 else a.float()
    n = work.shape[-1]
    columns = min(columns, min(work.shape[-2:]))
    start = torch.randn(n, columns, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    block = start.to(work).expand(work.shape[0], -1, -1)
    basis = []
    for _ in range(passes):
        block = torch.linalg.qr(work.mT @ (work @ block)).Q
        basis.append(block)
    space = torch.linalg.qr(torch.cat(basis, dim=-1)).Q if columns * passes <= n else block
    image = (work @ space).double()
    return torch.linalg.eigvalsh(image.mT @ image)[..., -1].clamp_min(0.0).sqrt()
