"""``rlspec.svd``: leading singular triplets with a bound on how good they are.

Axes: ``...`` any batch, ``m`` rows, ``n`` columns, ``r = min(m, n)``, ``k`` the rank asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from rlspec.backend import device_problem
from rlspec.errors import OptionError, TensorError
from rlspec.linalg.dense import lapack_svd, leading_by_gram
from rlspec.linalg.estimates import perturbation_bound
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.randomized import leading_svd, sketch_width
from rlspec.linalg.scaling import powers_of_two
from rlspec.linalg.shares import count_of_share
from rlspec.linalg.transfer import index_on, to_device
from rlspec.ops.residual_norms import residual_norms

Method = Literal["auto", "exact", "randomized", "warm"]

# Below this size dense routines win whatever the share; see bench/svd_bench.py.
_SMALL = 1280
# Below this tolerance float32 rounding is in the way.
_FLOAT32_TOL = 2e-5


@dataclass(frozen=True)
class SVDResult:
    """Leading singular triplets: ``A ~ U @ diag(S) @ Vh``.

    Attributes:
        U: left vectors, orthonormal columns, (..., m, k).
        S: singular values, descending, (..., k).
        Vh: right vectors as rows (the transpose is already taken, as in torch.linalg.svd), (..., k, n).
        residuals: of each triplet, the larger of |A v - s u| and |Aᵀ u - s v|, (..., k).
        subspace_bound: upper bound on the sine of the largest principal angle between the computed and the true
            leading subspaces, left and right, (...), float64. Infinite where nothing can be certified, as when
            sigma_k = sigma_{k+1}. Bounds of the iterative methods hold with probability 1 - 1e-9 over the draw.
        method: what was used: "exact", "randomized" or "warm".
        rounds: filters applied by the iterative methods, 0 for "exact".
        notes: what went otherwise than asked, in words.

    U, S, Vh and residuals are float64 for float64 input and float32 otherwise.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    subspace_bound: Tensor
    method: str
    rounds: int = 0
    notes: tuple[str, ...] = ()


def svd(
    A: Tensor,
    rank: int | float | None = None,
    *,
    method: Method = "auto",
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
    warm_start: SVDResult | Tensor | None = None,
    max_rounds: int = 4,
) -> SVDResult:
    """Leading ``rank`` singular triplets of every matrix of a batch.

    Args:
        A: (..., m, n), float64, float32, bfloat16 or float16, finite. On a device the iterative methods run there, and
            "exact" on the host; results are on the device of ``A``.
        rank: triplets wanted, a count from 1 to min(m, n), or a share of min(m, n) in (0, 1]: 1 is one triplet,
            1.0 is all of them, as None is.
        method: "exact" decomposes densely. "randomized" is Chebyshev-filtered subspace iteration from a random
            sketch. "warm" is the same from ``warm_start``. "auto" takes the cheapest for the shape, the rank and
            what was given. Every method falls back to "exact" where the iteration cannot help, and notes it.
        tol: for the iterative methods, the sine of the largest angle to the true subspaces to stop at. It is met
            with certainty where ``subspace_bound`` says so; where the cut splits a cluster of singular values, which
            no method can, the whole cluster is captured to ``tol`` instead, and a note says so.
        generator: CPU generator of the random draws; by default one with a fixed seed, so that equal calls agree.
        warm_start: an earlier result for a matrix nearby, or its ``Vh``, (..., k', n); needed by "warm".
        max_rounds: filters to try before falling back to "exact".

    Returns:
        See :class:`SVDResult`.

    Raises:
        OptionError: unknown method, rank or tolerance out of range, "warm" without a start.
        TensorError: not a dense floating matrix, one on a device that is neither CPU nor CUDA nor ROCm, or NaN or
            infinity (the message names the first position); or singular values or residuals past the range of the
            result's dtype.
    """
    _check_kind(A)
    if A.element_size() == 1:
        A = A.float()  # float8, which has next to no operations
    k = _check(A, rank, method, tol, warm_start, max_rounds)
    lead, (m, n) = A.shape[:-2], A.shape[-2:]
    out_dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    if A.numel() == 0 or k == 0:
        return _nothing(A, k, out_dtype)
    a = A.detach().reshape(-1, m, n)
    flipped = m < n
    a = a.mT if flipped else a
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    with pinned_arithmetic():
        start = _start_vectors(warm_start, lead, flipped, k, sketch_width(k, min(m, n)), (m, n))
        parts = _solve(a.to(out_dtype), k, method, tol, generator, start, max_rounds)
        _check_range(parts, a)
    u, v = (parts.Vh.mT, parts.U) if flipped else (parts.U, parts.Vh.mT)
    return SVDResult(
        U=u.reshape(*lead, m, k),
        S=parts.S.reshape(*lead, k),
        Vh=v.mT.reshape(*lead, k, n),
        residuals=parts.residuals.reshape(*lead, k),
        subspace_bound=parts.subspace_bound.reshape(lead),
        method=parts.method,
        rounds=parts.rounds,
        notes=parts.notes,
    )


def _solve(
    a: Tensor,
    k: int,
    method: Method,
    tol: float,
    generator: torch.Generator,
    start: Tensor | None,
    max_rounds: int,
) -> SVDResult:
    """The decomposition of (b, m, n) with m >= n, once the method is settled; Vh (b, k, n)."""
    n = a.shape[-1]
    if method == "auto":
        dense = n <= _SMALL or sketch_width(k, n) > 0.55 * n
        method = "exact" if dense else ("warm" if start is not None else "randomized")
    if method == "exact":
        return _exact(a, k)
    if sketch_width(k, n) >= n:
        return _with_note(_exact(a, k), f"{method}: the sketch would be as wide as the matrix, used exact")
    scale = powers_of_two(a)
    work = a / scale[:, None, None]
    if work.dtype == torch.float32 and tol < _FLOAT32_TOL:
        work = work.double()
    try:
        found = leading_svd(
            work,
            k,
            tol=tol,
            generator=generator,
            start=start if method == "warm" else None,
            max_rounds=max_rounds,
        )
    except torch.linalg.LinAlgError as error:
        return _with_note(_exact(a, k), f"{method}: the iteration broke down ({error}), used exact")
    s = (found.s * scale.to(found.s.dtype)[:, None]).to(a.dtype)
    u, v = found.u.to(a.dtype), found.v.to(a.dtype)
    bound = found.bound + math.sqrt(k) * torch.finfo(a.dtype).eps
    there = bound.to(a.device)
    result = SVDResult(u, s, v.mT, _residuals(a, scale, u, s, v), there, method, found.rounds)
    if bool(((bound > 2 * tol) & found.accepted).any()):
        note = (
            "the gap at the cut is too small to certify tol; the vectors span it together with their cluster"
        )
        result = _with_note(result, note)
    failed = [i for i, good in enumerate(found.accepted.tolist()) if not good]
    if failed:
        index = index_on(failed, a)
        exact = _exact(a[index], k)
        for mine, theirs in (
            (u, exact.U),
            (s, exact.S),
            (result.Vh, exact.Vh),
            (result.residuals, exact.residuals),
            (there, exact.subspace_bound),
        ):
            mine[index] = theirs
        note = f"{method}: {len(failed)} of {len(a)} did not reach tol in {found.rounds} rounds, used exact for those"
        result = _with_note(result, note)
        if len(failed) == len(a):
            result = replace(result, method="exact")
    return result


def _exact(a: Tensor, k: int) -> SVDResult:
    """Dense decomposition of (b, m, n), m >= n, truncated to k; that of a device's matrices on the host, see `dense`."""
    if a.is_cuda:
        found = _exact(a.cpu(), k)
        u, s, v, residuals = to_device((found.U, found.S, found.Vh.mT, found.residuals), a)
        return SVDResult(u, s, v.mT, residuals, found.subspace_bound.to(a.device), found.method)
    b, m, n = a.shape
    scale = powers_of_two(a)
    eps64, eps = torch.finfo(torch.float64).eps, torch.finfo(a.dtype).eps
    u, v = a.new_empty(b, m, k), a.new_empty(b, n, k)
    s, bound = a.new_empty(b, k), torch.empty(b, dtype=torch.float64)
    whole = k == m == n
    for i in range(b):  # dense routines gain nothing from a batch on a CPU, and a loop holds less memory
        if a.dtype == torch.float32:
            ui, si, vi, usable = leading_by_gram(a[i : i + 1] / scale[i], k)
            if bool(usable):
                u[i], s[i], v[i] = ui[0], si[0, :k] * scale[i], vi[0]
                # On the eigenvalue scale: rounding of the Gram matrix and of its eigenvectors, then of the cast.
                error = (m + n) * eps64 * si.square().sum(-1)
                bound[i] = perturbation_bound(si.square(), k, error, whole=whole)
                bound[i] += 0.0 if whole else math.sqrt(k) * eps
                continue
        ui, si, vhi = lapack_svd(a[i])
        u[i], s[i], v[i] = ui[:, :k], si[:k], vhi[:k].mT
        error = math.sqrt(m + n) * 2 * eps * si[:1].double()
        bound[i] = perturbation_bound(si[None], k, error, whole=whole)
    return SVDResult(u, s, v.mT, _residuals(a, scale, u, s, v), bound, "exact")


def _residuals(a: Tensor, scale: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """max(|A v - s u|, |Aᵀ u - s v|) of each triplet, (b, k); formed at unit scale, where no square overflows."""
    return residual_norms(a / scale[:, None, None], u, s / scale[:, None], v) * scale[:, None]


def _start_vectors(
    given: SVDResult | Tensor | None,
    lead: Sequence[int],
    flipped: bool,
    k: int,
    width: int,
    shape: tuple[int, int],
) -> Tensor | None:
    """Vectors of the shorter side to start from, (b, min(m, n), k'), or None."""
    if given is None:
        return None
    m, n = shape
    if isinstance(given, Tensor):
        rows = given
        wanted = (*lead, n)
        if (*given.shape[:-2], given.shape[-1]) != wanted:
            raise TensorError(f"warm_start must be (..., k', {n}) with A's batch, found {tuple(given.shape)}")
        if flipped:
            raise TensorError("a wide matrix is iterated on its left side: pass the whole earlier result")
    else:
        rows = given.U.mT if flipped else given.Vh
        if (*rows.shape[:-2], rows.shape[-1]) != (*lead, min(m, n)):
            raise TensorError(f"warm_start belongs to matrices of another shape than (..., {m}, {n})")
    return rows.reshape(-1, *rows.shape[-2:]).mT[..., :width]


def _check_kind(A: Tensor) -> None:
    if not isinstance(A, Tensor) or A.ndim < 2 or not A.is_floating_point():
        found = f"{A.dtype} {tuple(A.shape)}" if isinstance(A, Tensor) else type(A).__name__
        raise TensorError(f"svd needs a floating tensor of shape (..., m, n), found {found}")
    if A.layout != torch.strided:
        raise TensorError(f"svd needs a dense tensor, found {A.layout} {tuple(A.shape)}; give its to_dense()")
    if A.is_meta:
        raise TensorError(
            f"svd needs values, found a tensor {tuple(A.shape)} on the meta device; load it first"
        )
    problem = device_problem(A.device)
    if problem is not None:
        raise TensorError(f"svd {problem}")


def _check_range(found: SVDResult, a: Tensor) -> None:
    """Refuse what the result's dtype cannot hold: sigma_1 exceeds the largest entry by up to sqrt(m n)."""
    if bool(torch.isfinite(found.S).all()):
        return
    index = int((~torch.isfinite(found.S)).any(-1).nonzero()[0, 0])
    raise TensorError(
        f"matrix {index} of the batch has singular values past the range of {found.S.dtype} (its largest entry is "
        f"{float(a[index].abs().max()):.3g}); "
        + ("scale it down" if a.dtype == torch.float64 else "give it as float64")
    )


def _check(
    A: Tensor, rank: int | float | None, method: str, tol: float, warm_start: object, max_rounds: int
) -> int:
    """The rank as a count, after refusing everything that cannot be decomposed."""
    if method not in get_args(Method):
        raise OptionError(f"method={method!r} does not exist, choose one of {', '.join(get_args(Method))}")
    r = min(A.shape[-2:])
    if rank is None:
        rank = r
    if isinstance(rank, float) and 0.0 < rank <= 1.0:
        rank = count_of_share(rank, r)
    if isinstance(rank, bool) or not isinstance(rank, int) or not (1 <= rank <= r or rank == r):
        raise OptionError(
            f"rank={rank!r} must be a count from 1 to min(m, n) = {r}, or a share in (0, 1] (1.0 is all)"
        )
    if not 0 < tol < 1:
        raise OptionError(f"tol={tol} must lie between 0 and 1")
    if max_rounds < 1:
        raise OptionError(f"max_rounds={max_rounds} must be at least 1")
    if method == "warm" and warm_start is None:
        raise OptionError("method='warm' needs warm_start=")
    finite = torch.isfinite(A)
    if not bool(finite.all()):
        place = tuple(int(i) for i in (~finite).nonzero()[0])
        raise TensorError(f"matrix holds {A[place].item()} at position {place}: nothing can be decomposed")
    return rank


def _nothing(A: Tensor, k: int, dtype: torch.dtype) -> SVDResult:
    """The result for an empty batch or a matrix without rows or columns."""
    lead, (m, n) = A.shape[:-2], A.shape[-2:]
    new = A.new_zeros
    return SVDResult(
        new(*lead, m, k, dtype=dtype),
        new(*lead, k, dtype=dtype),
        new(*lead, k, n, dtype=dtype),
        new(*lead, k, dtype=dtype),
        new(lead, dtype=torch.float64),
        "exact",
    )


def _with_note(result: SVDResult, note: str) -> SVDResult:
    return replace(result, notes=(*result.notes, note))
