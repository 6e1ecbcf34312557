"""Put a reference's singular directions or values back into a tuned matrix.

Axes: ``m`` by ``n`` matrices, r = min(m, n); base ``W_b = U_b S_b V_bᵀ``, tuned ``W_t = U_t S_t V_tᵀ``,
both thin. Every mode is a change added to the tuned weight, so what is not touched stays as it is, bit for
bit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Real
from types import NoneType
from typing import get_args

import torch
from torch import Tensor

from rlspec.backend import device_problem
from rlspec.errors import OptionError, TensorError, check_type
from rlspec.io.projections import check_finite
from rlspec.linalg.factor import reference_factors
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.rank import Rank, RankLike
from rlspec.linalg.workers import threads_for
from rlspec.ops.draws import Draws
from rlspec.perturb.matrix import MatrixBasis, matrix_basis
from rlspec.restore.change import Change, restoring_change
from rlspec.restore.options import Mode, Rounding


@dataclass(frozen=True)
class RestoreResult:
    """A restored matrix and the report of what was done to it.

    ``weight`` (m, n) in the dtype asked for. ``change_frobenius`` is the norm of the intended change W' - W_t before
    rounding, ``change_relative`` the same over ||W_t||_F (0 where that is 0). ``rounding_share`` is the norm of what
    rounding to the dtype added or lost, over ``change_frobenius``. ``error_estimate`` is an estimate, on the safe
    side, of the Frobenius error of the change before rounding. ``k`` counts the directions replaced; ``method`` is
    "delta", "exact" or "none" (no decomposition needed). ``rotation_sine_rms`` is the root mean square of the sines
    of the principal angles between the tuned and the base's replaced directions, the larger of the two sides; None
    where nothing was decomposed. ``note`` says what was left out, and why.
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
    rotation_sine_rms: float | None = None
    note: str | None = None


@pinned_arithmetic()
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
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> RestoreResult:
    """Restore part of a tuned matrix to its base.

    With I the indices chosen (the leading k; the last k for ``tail``; [i, j) for ``band``):

    * ``directions``, ``tail``, ``band``: W_t - U_t,I S_t,I V_t,Iᵀ + U_b,I S_t,I V_b,Iᵀ. The tuned singular values
      stay, the base's directions take the tuned ones' place ("UV restoration", arXiv 2508.16546). With k = r that
      is U_b S_t V_bᵀ.
    * ``directions_and_values``: the same with S_b,I.
    * ``values``: the tuned directions with the base's values, W_t + U_t,I (S_b,I - S_t,I) V_t,Iᵀ.
    * ``copy``, ``interpolate``: W_t + strength (W_b - W_t): the base itself, or WiSE-FT's straight line to it.

    Directions of the base that belong to no singular value above rounding are arbitrary: the tuned values are not put
    on them, and ``note`` says so.

    Args:
        W_base, W_tuned: (m, n), floating dtypes, finite. The work is done on the device of ``W_tuned``.
        rank: share or count of directions, see :class:`rlspec.spectra.Rank`.
        band: I = [i, j) with 0 <= i < j <= r, needed by ``mode="band"`` and taken by the modes of directions and
            values, in place of the leading k.
        strength: in [0, 1], share of the change that is made. 0 gives ``W_tuned`` bit for bit.
        dtype: of the result; default that of ``W_tuned``.
        rounding: to nearest, or stochastic (unbiased: small changes survive on average).
        basis: the base's decomposition, where it is at hand.
        exact: decompose the tuned matrix in float64 instead of working from the update; slower, for checking.
        generator: of the CPU, for stochastic rounding; a matrix takes two numbers from it. Default: torch's own.

    Raises:
        OptionError: an unknown mode or rounding, a strength or band out of range, an argument of another type.
        TensorError: shapes differ or are not two-dimensional, dtypes that are not floating, NaN or infinity; a basis
            of another matrix; a device that is neither CPU nor CUDA nor ROCm.
    """
    for name, given in (("W_base", W_base), ("W_tuned", W_tuned)):
        check_type(name, given, Tensor, "a tensor")
    check_type("strength", strength, Real, "a number")
    check_type("dtype", dtype, (torch.dtype, NoneType), "a torch.dtype")
    check_type(
        "basis", basis, (MatrixBasis, NoneType), "a MatrixBasis, as SpectralBasis.matrix(name) gives it"
    )
    _check(W_base, W_tuned, mode, band, strength, rounding)
    if basis is not None:
        _check_basis(basis, W_base)
    target = dtype if dtype is not None else W_tuned.dtype
    if not target.is_floating_point:
        raise OptionError(f"dtype {target} is not a floating one")
    arguments = (Rank.parse(rank), mode, band, strength, target, rounding, basis, exact, generator)
    # As where several are restored side by side, so that the bits are the same.
    with threads_for(W_tuned.numel() if W_tuned.device.type == "cpu" else sys.maxsize):
        return _restored(W_base, W_tuned, *arguments)


def _restored(
    W_base: Tensor,
    W_tuned: Tensor,
    rank: Rank,
    mode: Mode,
    band: tuple[int, int] | None,
    strength: float,
    target: torch.dtype,
    rounding: Rounding,
    basis: MatrixBasis | None,
    exact: bool,
    generator: torch.Generator | None,
) -> RestoreResult:
    note = None
    if mode in ("copy", "interpolate"):
        k = min(W_tuned.shape)
        change = Change(difference(W_base, W_tuned), 0.0, 0.0, "none")
    else:
        base = (
            basis
            if basis is not None
            else matrix_basis("base", W_base.cpu(), reference_factors(W_base.cpu()), rank)
        )
        start, stop = _indices(rank.resolve(base.S), base.S.shape[0], mode, band)
        numerical = base.numerical_rank
        if stop > numerical and mode not in ("values", "directions_and_values"):
            note = f"the base has numerical rank {numerical}: of [{start}, {stop}) only what is below that is restored"
            start, stop = min(start, numerical), numerical
        k = stop - start
        if k == 0:
            change = Change(torch.zeros_like(W_tuned, dtype=torch.float32), 0.0, 0.0, "none")
        else:
            change = restoring_change(base, W_tuned, start, stop, mode, exact=exact)
    draws = Draws.of(generator) if rounding == "stochastic" else None
    weight, sums = change.added(W_tuned, strength, target, draws)
    if is_plain_copy(mode, strength, W_base.dtype, target):
        weight = W_base.to(W_tuned.device, copy=True)
    return RestoreResult(
        weight=weight,
        mode=mode,
        k=k,
        strength=strength,
        change_frobenius=sums.frobenius,
        change_relative=sums.relative,
        rounding_share=sums.rounding_share,
        entries_changed=sums.entries_changed,
        error_estimate=strength * change.error + change.rounding * sums.frobenius,
        method=change.method,
        rotation_sine_rms=None if change.method == "none" else change.sine_rms,
        note=note,
    )


def is_plain_copy(mode: str, strength: float, base: torch.dtype, target: torch.dtype) -> bool:
    """Whether the result is the base itself, to the bit and the sign of a zero."""
    return mode == "copy" and strength == 1.0 and base == target


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """W_b - W_t, exact for two tensors of 16 bits."""
    wide = torch.float32 if base.element_size() <= 2 and tuned.element_size() <= 2 else torch.float64
    return base.to(device=tuned.device, dtype=wide) - tuned.to(wide)


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
    for tensor in (base, tuned):
        if not tensor.is_floating_point():
            raise TensorError(f"restoring needs matrices of a floating dtype, found {tensor.dtype}")
        problem = device_problem(tensor.device)
        if problem is not None:
            raise TensorError(f"restoring {problem}")
    if mode == "band" and band is None:
        raise OptionError('mode="band" needs band=(i, j)')
    if band is not None and mode in ("tail", "copy", "interpolate"):
        raise OptionError(f"band={band} says nothing to mode={mode!r}")
    if band is not None and not 0 <= band[0] < band[1] <= min(base.shape):
        raise OptionError(f"band {band} is not within [0, {min(base.shape)})")
    check_finite("W_base", base)
    check_finite("W_tuned", tuned)


def same_entries(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices of one dtype hold the same numbers, wherever they lie; torch.equal does not know fp8."""
    return torch.equal(first.to(second.device).double(), second.double())


def _check_basis(basis: MatrixBasis, base: Tensor) -> None:
    """Directions of another matrix would be put in without a word."""
    # As a model's matrices come: copies of 16 bytes an entry would compare them with themselves.
    if base is basis.W:
        return
    if basis.W.shape != base.shape:
        problem = f"shape {tuple(basis.W.shape)}, W_base has {tuple(base.shape)}"
    elif not same_entries(basis.W, base.to(basis.W.dtype)):
        problem = "other entries than W_base"
    else:
        return
    raise TensorError(f"basis {basis.name}: is of a matrix with {problem}; give that of W_base, or none")


def _indices(k: int, r: int, mode: str, band: tuple[int, int] | None) -> tuple[int, int]:
    """The indices [start, stop) that a mode replaces."""
    if band is not None:
        return band
    return (r - k, r) if mode == "tail" else (0, k)
