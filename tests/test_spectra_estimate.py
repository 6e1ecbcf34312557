"""The estimates that decide about refinement, against the error they estimate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlspec.linalg.factor import reference_factors
from rlspec.linalg.rank import Rank
from rlspec.perturb.coordinates import Pair, Side, diagonalise
from rlspec.perturb.delta import DenseDelta
from rlspec.perturb.estimate import remaining_error
from rlspec.perturb.first_order import first_order
from rlspec.perturb.matrix import matrix_basis
from rlspec.perturb.reference import Reference
from rlspec.perturb.refine import refine
from rlspec.perturb.residual import residual, rotated
from rlspec.perturb.solve import solve

F64 = torch.float64


def reference_and_update(shape: tuple[int, int], eps: float, rank: int | None):
    g = torch.Generator().manual_seed(shape[0])
    m, n = shape
    r = min(shape)
    u = torch.linalg.qr(torch.randn(m, r, dtype=F64, generator=g)).Q
    v = torch.linalg.qr(torch.randn(n, r, dtype=F64, generator=g)).Q
    weight = (u * (1 / (1 + 3 * torch.arange(r) / r))) @ v.T
    e = torch.randn(m, n, dtype=F64, generator=g)
    if rank is not None:
        e = e[:, :rank] @ torch.randn(rank, n, dtype=F64, generator=g)
    tuned = weight + e * (eps * weight.norm() / e.norm())
    basis = matrix_basis("w", weight, reference_factors(weight), Rank.parse(0.2))
    return Reference.of([basis]), tuned.unsqueeze(0)


def missing(reference: Reference, pair: Pair, tuned: torch.Tensor) -> float:
    """Frobenius norm of what the candidate has outside the true leading subspace; the larger side's."""
    k = reference.k
    u, _, vh = torch.linalg.svd(tuned[0], full_matrices=False)
    sides = ((reference.U[0], pair.left, u[:, :k]), (reference.Vh[0].mT, pair.right, vh[:k].mT))
    norms = []
    for factor, side, truth in sides:
        rows = side.rows(0, k)[0]
        x = factor @ rows[: factor.shape[1]]
        if rows.shape[0] > factor.shape[1]:
            x = x + rows[factor.shape[1] :]
        norms.append(float((x - truth @ (truth.mT @ x)).norm()))
    return max(norms)


@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("shape", [(120, 120), (60, 150), (150, 60)])
@pytest.mark.parametrize("eps", [1e-3, 1e-2, 4e-2])
def test_the_estimate_is_near_the_error_before_and_after_a_sweep(shape, eps, rank):
    reference, tuned = reference_and_update(shape, eps, rank)
    delta = DenseDelta.between(tuned, reference.W)
    left, right, core, grams, _ = first_order(reference, delta)
    pair = diagonalise(left, right, core, grams)
    for _ in range(2):
        found = remaining_error(reference.sample, residual(reference, delta, pair))
        turned = float(torch.maximum(rotated(pair.left, reference.k), rotated(pair.right, reference.k)))
        ratio = float(found.subspace) * turned / missing(reference, pair, tuned)
        assert 0.3 < ratio < 4.0
        pair = refine(reference, delta, pair)


def test_a_dropped_rotation_is_seen():
    """The twin that must fail: the reference's own subspaces, as if nothing had turned."""
    reference, tuned = reference_and_update((100, 100), 1e-2, None)
    solution = solve(reference, DenseDelta.between(tuned, reference.W))
    good = remaining_error(reference.sample, solution.left_over)
    still = [
        Side(torch.eye(side.lead.shape[-1], dtype=F64)[None], torch.zeros_like(side.tail), None)
        for side in (solution.pair.left, solution.pair.right)
    ]
    dropped = replace(solution.pair, left=still[0], right=still[1])
    bad = remaining_error(reference.sample, residual(reference, solution.delta, dropped))
    turned = float(rotated(solution.pair.left, reference.k))
    assert float(good.subspace) * turned < 2e-2 * turned
    # Nothing is counted as turned there, so the absolute error is what to compare: all of the rotation is missing.
    assert float(bad.subspace) * float(rotated(still[0], reference.k)) == pytest.approx(turned, rel=0.3)
