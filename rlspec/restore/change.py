"""The change W' - W_t that restoring singular directions or values of one matrix means.

Axes: ``m`` by ``n``, r = min(m, n); I = [start, stop) the indices restored, c = stop - start of them. Base
``W_b = U_b S_b V_bᵀ``, tuned ``W_t = U_t S_t V_tᵀ``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlspec.linalg.dense import thin_svd
from rlspec.linalg.transfer import to_host
from rlspec.ops.add_low_rank import LowRank, add_low_rank
from rlspec.ops.add_rounded import ChangeSums, add_rounded
from rlspec.ops.draws import Draws
from rlspec.perturb.coordinates import Side
from rlspec.perturb.delta import Delta, DenseDelta, frobenius
from rlspec.perturb.leading import largest_outside
from rlspec.perturb.matrix import MatrixBasis
from rlspec.perturb.part import part_error, part_rounding
from rlspec.perturb.reference import Reference
from rlspec.perturb.solve import is_perturbation, solve

# Beyond this share of the base's norm, or of its directions, the tuned matrix is decomposed afresh.
_LARGEST_UPDATE = 0.1
_DEEPEST = 0.6
# Error of the subspaces to reach, as a share of their rotation: the change is wrong by about as much.
_SUBSPACE = 3.2e-3
# Roundings of E, and of the change, that add up on the way from the one to the other.
_STEPS = 4.0


@dataclass(frozen=True)
class Change:
    """``delta`` (m, n) float32 or float64, at full strength.

    ``error`` estimates its Frobenius error, but for the rounding of its arithmetic, which is ``rounding`` of its norm.
    ``sine_rms`` is the root mean square of the sines of the principal
    angles between the tuned and the base's directions I, the larger of the two sides: the rotation that is undone.
    ``method`` is "delta", "exact" or "none".
    """

    delta: Tensor | LowRank
    error: float
    sine_rms: float
    method: str
    rounding: float = 0.0

    def added(
        self, tuned: Tensor, strength: float, dtype: torch.dtype, draws: Draws | None
    ) -> tuple[Tensor, ChangeSums]:
        """``tuned + strength * delta`` (m, n) in ``dtype``; see :func:`rlspec.ops.add_rounded.add_rounded`."""
        if isinstance(self.delta, LowRank):
            return add_low_rank(tuned, self.delta, strength, dtype, draws=draws)
        return add_rounded(tuned, self.delta, strength, dtype, draws=draws)


def restoring_change(
    base: MatrixBasis, tuned: Tensor, start: int, stop: int, mode: str, *, exact: bool = False
) -> Change:
    """What to add to the tuned weight.

    Args:
        base: the base's complete decomposition.
        tuned: (m, n), any floating dtype.
        mode: "values", "directions_and_values", or else directions.
        exact: decompose the tuned matrix in float64 whatever the update.
    """
    if not exact and stop <= min(base.numerical_rank, max(1, int(_DEEPEST * base.S.shape[0]))):
        reference = Reference.of([replace(base, k=stop)], device=tuned.device)
        delta = DenseDelta.between(tuned.unsqueeze(0), reference.W)
        if bool(is_perturbation(reference, delta, _LARGEST_UPDATE)):
            found = _by_perturbation(reference, delta, start, stop, mode)
            if found is not None:
                return found
    return _by_decomposition(base, tuned, start, stop, mode)


def _by_perturbation(reference: Reference, delta: Delta, start: int, stop: int, mode: str) -> Change | None:
    """From the update alone, or None where it is too large for that.

    In the base's coordinates the tuned directions are the identity's columns I plus something as small as the
    rotation. The change is written in those small parts, so that float32's rounding is relative to it and not to
    the weight: with a, b the tuned left and right coordinates along I, and D_u, D_v what lies outside of them,

        U_b S V_bᵀ - U_t S_t V_tᵀ = U_b (S - a S_t bᵀ) V_bᵀ - D_u S_t bᵀ V_bᵀ - (U_b a + D_u) S_t D_vᵀ
    """
    solution = solve(reference, delta, subspace_tolerance=_SUBSPACE)
    if not bool(solution.settled.all()):
        return None
    pair = solution.pair
    _, overtaken = largest_outside(reference, solution.delta, pair, solution.left_over.sigma)
    if bool(overtaken.any()):
        return None
    u, v = reference.U[0, :, start:stop], reference.Vh[0, start:stop].mT
    inside_left, outside_left = _split(reference.U[0], pair.left, start, stop)
    inside_right, outside_right = _split(reference.Vh[0].mT, pair.right, start, stop)
    tuned, dtype = pair.sigma[0, start:stop], u.dtype
    if mode == "values":
        scale = (reference.S[0, start:stop] - tuned).to(dtype)
        left = u @ inside_left.to(dtype) + outside_left
        change = LowRank(left * scale, v @ inside_right.to(dtype) + outside_right)
    else:
        values = reference.S[0, start:stop] if mode == "directions_and_values" else tuned
        core = torch.diag(values) - (inside_left * tuned) @ inside_right.mT
        near = u @ core.to(dtype) - outside_left @ (inside_right * tuned).mT.to(dtype)
        far = (u @ inside_left.to(dtype) + outside_left) * tuned.to(dtype)
        change = LowRank(torch.cat([near, -far], dim=1), torch.cat([v, outside_right], dim=1))
    norms = to_host([frobenius(x) for x in (outside_left, outside_right)])
    left_norm, right_norm = (float(norm) for norm in norms)
    # E was rounded once where it was taken, and then with all that was done in the dtype of the factors.
    eps = 0.5 * torch.finfo(delta.dtype).eps + _STEPS * torch.finfo(dtype).eps
    rounding = eps * delta.stats.delta_frobenius
    error = part_error(reference, solution.left_over, start) + rounding
    error += part_rounding(solution.left_over.sigma, start, stop, reference.shape, rounding)
    return Change(
        change,
        float(error) + _float64_error(reference.shape, start, stop, reference.values[0, : reference.width]),
        max(left_norm, right_norm) / (stop - start) ** 0.5,
        "delta",
        _STEPS * torch.finfo(dtype).eps,
    )


def _split(factor: Tensor, side: Side, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Columns I of a side: coordinates along the base's own I (c, c) float64, and all the rest as vectors (dim, c)."""
    lead = side.lead[0, :, start:stop]
    inside = lead[start:stop]
    beside = torch.cat([lead[:start], lead[stop:]]).to(factor.dtype)
    w = lead.shape[0]
    outside = factor[:, w:] @ side.tail[0, :, start:stop]
    if beside.shape[0] > 0:
        outside += torch.cat([factor[:, :start], factor[:, stop:w]], dim=1) @ beside
    if side.outside is not None:
        outside += side.outside[0, :, start:stop]
    return inside, outside


def _by_decomposition(base: MatrixBasis, tuned: Tensor, start: int, stop: int, mode: str) -> Change:
    """From a float64 decomposition of the tuned matrix, on the host."""
    u, s, vh = thin_svd(tuned.cpu().double())
    largest = max(float(base.S.norm()), float(s.norm()))
    error = _float64_error(base.shape, start, stop, base.S, s)
    u, s, v = u[:, start:stop], s[start:stop], vh[start:stop].mT
    u_base, v_base = base.U[:, start:stop].double(), base.Vh[start:stop].double().mT
    values = base.S[start:stop]
    if mode == "values":
        delta = (u * (values - s)) @ v.mT
    else:
        restored = values if mode == "directions_and_values" else s
        delta = (u_base * restored) @ v_base.mT - (u * s) @ v.mT
    outside = [x - y @ (y.mT @ x) for x, y in ((u, u_base), (v, v_base))]
    sine_rms = max(float(x.norm()) for x in outside) / (stop - start) ** 0.5
    # LAPACK's backward error, and that of base factors kept in float32.
    eps = torch.finfo(base.U.dtype).eps + 16.0 * torch.finfo(torch.float64).eps
    error += 4.0 * eps * largest * max(base.shape) ** 0.5
    return Change(delta.to(tuned.device), error, sine_rms, "exact")


def _float64_error(shape: tuple[int, int], start: int, stop: int, *spectra: Tensor) -> float:
    """What float64 decompositions leave unsaid of the parts along I of matrices of these singular values, (v,) each."""
    exactly = torch.zeros(1, dtype=torch.float64)
    return sum(float(part_rounding(values[None], start, stop, shape, exactly)) for values in spectra)
