"""Put a reference's singular directions or values back into a tuned matrix.

Axes: ``m`` by ``n`` matrices, r = min(m, n); base ``W_b = U_b S_b V_bᵀ``, tuned ``W_t = U_t S_t V_tᵀ``,
both thin. Every mode is a change added to the tuned weight, so what is not touched stays as it is, bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlspec.errors import OptionError, TensorError
from rlspec.io.projections import check_finite
from rlspec.linalg.exact import exact_svd
from rlspec.spectra.bounds import probe_bounds
from rlspec.spectra.factor import reference_factors
from rlspec.spectra.matrix import MatrixBasis, matrix_basis
from rlspec.spectra.measurement import ReferenceStack
from rlspec.spectra.metrics import update
from rlspec.spectra.rank import Rank, RankLike
from rlspec.spectra.solve import solve

Mode = Literal["directions", "directions_and_values", "values", "tail", "band", "copy", "interpolate"]
Rounding = Literal["nearest", "stochastic"]

# Beyond this share of the base's norm the tuned matrix is decomposed afresh.
_DELTA_FORM = 0.1


@dataclass(frozen=True)
class RestoreResult:
    """A restored matrix and the report of what was done to it.

    ``weight`` (m, n) in the dtype asked for. ``change_frobenius`` is the norm of the intended change W' -
    W_t before rounding, ``change_relative`` the same over ||W_t||_F. ``rounding_share`` is the norm of what
    rounding to the dtype added or lost, over ``change_frobenius``. ``error_estimate`` bounds the Frobenius
    error of the change before rounding. ``k`` counts the directions replaced; ``method`` is "delta",
    "exact" or "none" (no decomposition needed).
    """

    weight: Tensor
    mode: str
    k: int
    strength: float
    change_frobenius: float
    change_relative: float
    rounding_share: float
    entries_changed: int
    error_estimate: float
    method: str


def restore_matrix(
    W_base: Tensor,
    W_tuned: Tensor,
    rank: RankLike,
    *,
    mode: Mode = "directions",
    band: tuple[int, int] | None = None,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    basis: MatrixBasis | None = None,
    generator: torch.Generator | None = None,
) -> RestoreResult:
    """Restore part of a tuned matrix to its base.

    With I the indices chosen (the leading k; the last k for ``tail``; [i, j) for ``band``):

    * ``directions``, ``tail``, ``band``: W_t - U_t,I S_t,I V_t,Iᵀ + U_b,I S_t,I V_b,Iᵀ. The tuned singular
    values
      stay, the base's directions take the tuned ones' place ("UV restoration", arXiv 2508.16546). With k =
      r that is U_b S_t V_bᵀ.
    * ``directions_and_values``: the same with S_b,I.
    * ``values``: the tuned directions with the base's values, W_t + U_t,I (S_b,I - S_t,I) V_t,Iᵀ.
    * ``copy``, ``interpolate``: W_t + strength (W_b - W_t): the base itself, or WiSE-FT's straight line to
    it.

    Args:
        W_base, W_tuned: (m, n), floating dtypes, finite.
        rank: share or count of directions, see :class:`rlspec.spectra.Rank`.
        band: [i, j) with 0 <= i < j <= r, for ``mode="band"``.
        strength: in [0, 1], share of the change that is made. 0 gives ``W_tuned`` bit for bit.
        dtype: of the result; default that of ``W_tuned``.
        rounding: to nearest, or stochastic (unbiased: small changes survive on average).
        basis: the base's decomposition, where it is at hand.
        generator: for stochastic rounding.

    Raises:
        OptionError: an unknown mode or rounding, a strength or band out of range.
        TensorError: shapes differ or are not two-dimensional, NaN or infinity.
    """
    _check(W_base, W_tuned, mode, band, strength, rounding)
    target = dtype if dtype is not None else W_tuned.dtype
    tuned = W_tuned.double()
    method, error = "none", 0.0
    if mode in ("copy", "interpolate"):
        k = min(tuned.shape)
        change = W_base.double() - tuned
    else:
        base = (
            basis
            if basis is not None
            else matrix_basis("base", W_base, reference_factors(W_base), Rank.parse(rank))
        )
        start, stop = _indices(Rank.parse(rank).resolve(base.S), base.S.shape[0], mode, band)
        k = stop - start
        u, s, v, method, angle = _tuned_factors(base, W_tuned, start, stop)
        change = _change(base, (u, s, v), start, stop, mode)
        error = strength * 2.0 * k**0.5 * angle * float(s[0]) if k else 0.0
    change = strength * change
    weight = _round(W_tuned, tuned + change, target, rounding, generator)
    size = float(change.norm())
    lost = float((weight.double() - tuned - change).norm())
    return RestoreResult(
        weight=weight,
        mode=mode,
        k=k,
        strength=strength,
        change_frobenius=size,
        change_relative=size / float(tuned.norm()) if size else 0.0,
        rounding_share=lost / size if size else 0.0,
        entries_changed=int((weight.double() != tuned).sum()),
        error_estimate=error,
        method=method,
    )


def _check(
    base: Tensor, tuned: Tensor, mode: str, band: tuple[int, int] | None, strength: float, rounding: str
) -> None:
    if mode not in get_args(Mode):
        raise OptionError(f"unknown mode {mode!r}; valid: {', '.join(get_args(Mode))}")
    if rounding not in get_args(Rounding):
        raise OptionError(f"unknown rounding {rounding!r}; valid: {', '.join(get_args(Rounding))}")
    if not 0.0 <= strength <= 1.0:
        raise OptionError(f"strength {strength!r} is not in [0, 1]")
    if base.ndim != 2 or base.shape != tuned.shape:
        raise TensorError(
            f"restoring needs two matrices of one shape, found {tuple(base.shape)} and {tuple(tuned.shape)}"
        )
    if (mode == "band") != (band is not None):
        raise OptionError('mode="band" and band=(i, j) go together')
    if band is not None and not 0 <= band[0] < band[1] <= min(base.shape):
        raise OptionError(f"band {band} is not within [0, {min(base.shape)})")
    check_finite("W_base", base)
    check_finite("W_tuned", tuned)


def _indices(k: int, r: int, mode: str, band: tuple[int, int] | None) -> tuple[int, int]:
    """The indices [start, stop) that a mode replaces."""
    if band is not None:
        return band
    return (r - k, r) if mode == "tail" else (0, k)


def _tuned_factors(
    base: MatrixBasis, tuned: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor, str, float]:
    """Tuned U_I, S_I, V_I in float64, how they were found, and a bound on their subspaces' angles.

    Leading directions of a small update come from the delta form, which costs no second decomposition.
    """
    if start == 0 and stop == base.k:
        reference = ReferenceStack.of([base])
        change = update(tuned.unsqueeze(0), reference.W)
        if float(change.delta_frobenius) <= _DELTA_FORM * float(change.reference_frobenius):
            pair, _, settled = solve(reference, change)
            if bool(settled.all()):
                bounds = probe_bounds(reference, change.delta.to(reference.U.dtype), pair)
                u = _explicit(reference.U[0], pair.left.rows(0, stop)[0])
                v = _explicit(reference.Vh[0].mT, pair.right.rows(0, stop)[0])
                return u, pair.sigma[0, :stop], v, "delta", float(bounds.angle)
    u, s, vh = exact_svd(tuned.double())
    return u[:, start:stop], s[start:stop], vh.mT[:, start:stop], "exact", 0.0


def _explicit(factor: Tensor, rows: Tensor) -> Tensor:
    """Columns from their coordinates (r [+ dim], c) in the reference factor (dim, r); float64."""
    r = factor.shape[1]
    columns = factor.double() @ rows[:r].double()
    return columns if rows.shape[0] == r else columns + rows[r:].double()


def _change(
    base: MatrixBasis, tuned: tuple[Tensor, Tensor, Tensor], start: int, stop: int, mode: str
) -> Tensor:
    """W' - W_t at full strength, (m, n) float64."""
    u, s, v = tuned
    if mode == "values":
        return (u * (base.S[start:stop] - s)) @ v.mT
    values = base.S[start:stop] if mode == "directions_and_values" else s
    replaced = (base.U[:, start:stop].double() * values) @ base.Vh[start:stop].double()
    return replaced - (u * s) @ v.mT


def _round(
    original: Tensor, exact: Tensor, dtype: torch.dtype, rounding: str, generator: torch.Generator | None
) -> Tensor:
    """``exact`` (float64) in ``dtype``; an entry whose change is under half a unit in the last place stays
    as it is."""
    nearest = exact.to(dtype)
    if rounding == "nearest":
        kept = original.to(dtype)
        # A conversion by way of float32 rounds twice, and may move an entry that should stay.
        stay = (exact - kept.double()).abs() <= (exact - nearest.double()).abs()
        return torch.where(stay, kept, nearest)
    above = nearest.double() > exact
    limit = torch.full_like(nearest, torch.inf)
    low = torch.where(above, torch.nextafter(nearest, -limit), nearest)
    high = torch.where(above, nearest, torch.nextafter(nearest, limit))
    share = (exact - low.double()) / (high.double() - low.double())
    draw = torch.rand(exact.shape, generator=generator, dtype=torch.float64, device=exact.device)
    return torch.where(draw < share, high, low)
