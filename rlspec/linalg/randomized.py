"""Leading singular triplets by Chebyshev-filtered subspace iteration, cold or from a given start.

The textbook randomized SVD (Halko, Martinsson and Tropp, SIAM Review 53, 2011) multiplies a sketch by ``AᵀA`` a few
times. At a share of 20 % of an attention weight's singular values the spectrum is flat at the cut, and that converges
hopelessly slowly. Here the sketch is half as wide again as the wanted space, each product counts as a degree of a
Chebyshev polynomial, and every round after the first filters the correction only (see :mod:`.chebyshev`).

Corrections are filtered in the dtype of A or, with AMX, with factors rounded to bfloat16; what judges them, Rayleigh-Ritz
and residuals, is in float32, or in float64 where float32's rounding would hide that the tolerance is met.

On a device the blocks stay there, and matrices of a batch advance together: the host sees Ritz values and lengths, and
decides. It waits three times before the first round and at most three times in each.

Axes: ``b`` batch, ``m >= n`` rows and columns, ``k`` wanted, ``l`` sketch columns, ``p`` columns with known residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.linalg.chebyshev import Operator, filter_correction, filter_sketch
from rlspec.linalg.coarse import coarse_refusal, coarse_symmetric
from rlspec.linalg.degrees import column_errors, filter_degree, rounding_blurs, sketch_degree
from rlspec.linalg.dense import pencil
from rlspec.linalg.estimates import ResidualSizes, residual_sizes, ritz_bound
from rlspec.linalg.lanczos import norm_bound, random_start, spectrum_quantiles, tridiagonal
from rlspec.linalg.orth import orthonormal, well_conditioned
from rlspec.linalg.products import ALIGNED, transposed_product
from rlspec.linalg.transfer import to_host
from rlspec.ops.chebyshev_step import Moments, in_kernel
from rlspec.ops.draws import Signs
from rlspec.ops.gram import gram, product_eps

# Of the filter for columns that start near the wanted ones. What comes beside them is filtered as a sketch is: with less,
# the guard columns are too poor, and a warm start takes more rounds than a cold one saves.
_START_DEGREE = 2
# What a filter leaves of an error: some hundredth with rough products, however high its degree. In float32 less for a
# column, but the bound is on all columns together.
_LEFT_OVER = 2.0**-7


@dataclass(frozen=True)
class Leading:
    """Leading triplets of a batch: u (b, m, k), s (b, k), v (b, n, k); on the host ``bound`` (b,) float64 and
    ``accepted`` (b,) bool."""

    u: Tensor
    s: Tensor
    v: Tensor
    bound: Tensor
    accepted: Tensor
    rounds: int


def sketch_width(k: int, n: int) -> int:
    """Columns of the sketch for k wanted ones: half as many again, rounded up to 64, at most n."""
    return min(n, 64 * math.ceil(1.5 * k / 64))


def leading_svd(
    a: Tensor,
    k: int,
    *,
    tol: float,
    generator: torch.Generator,
    start: Tensor | None = None,
    max_rounds: int = 4,
) -> Leading:
    """Leading k singular triplets of each matrix to a subspace error of ``tol``.

    Args:
        a: (b, m, n) with m >= n, float32 or float64, entries of moderate size, finite.
        k: wanted triplets, with ``sketch_width(k, n) < n``.
        tol: largest principal angle's sine wanted, left and right.
        generator: CPU generator of the sketch and of the probes.
        start: right vectors (b, n, k') believed to be near the wanted ones, k' <= sketch width.
        max_rounds: filters at most.

    Returns:
        Triplets with a bound; ``accepted`` is False where neither the bound nor the residuals reached ``tol`` (or
        where ``A`` is too close to rank-deficient for its Gram matrix), and those results are not to be used.

    Raises:
        torch.linalg.LinAlgError: the basis of some matrix broke down; or no sketch found wanted values above the estimate
            of the unwanted part, as where dozens of values exceed the others a hundredfold.
    """
    b, _, n = a.shape
    width = sketch_width(k, n)
    apply = _operator(a, width)
    quantiles, top = spectrum_quantiles(apply, random_start(b, n, generator, a), [k / n, width / n])
    eps = product_eps(a.device, a.dtype)
    edge = torch.maximum(quantiles[:, 1], 4 * eps * top)
    edge = torch.where(edge > 0, edge, torch.ones_like(edge))  # a zero matrix has no edge
    edge = edge.to(a.dtype)[:, None, None]  # on the host, like all that decisions are made from

    given = 0 if start is None else start.shape[-1]
    signs = Signs.of(generator, (b, n, width - given))
    degree, there = sketch_degree(quantiles[:, 0], top, edge, eps), edge.to(a.device)
    y = filter_sketch(apply, signs, there, degree)
    if start is not None:
        y = torch.cat([filter_sketch(apply, start.to(a), there, _START_DEGREE), y], dim=-1)
    y = well_conditioned(y)
    y, image, theta, q = _rayleigh_ritz(y, apply, lambda y, image: y.mT @ image, a.dtype)
    z = y @ q
    residual = image @ q - z * theta.to(z).unsqueeze(-2)

    if bool((theta[:, k - 1] <= edge.flatten()).all()):
        # Filters would suppress what is wanted, and rounds pass in vain before the dense routine has its turn.
        raise torch.linalg.LinAlgError("the sketch found too little above the estimated spectrum")

    resolution = 100 * eps * theta[:, 0]
    before = torch.full_like(top, math.inf)
    fine, measured = a, False
    rough = coarse_symmetric(apply.matrix) if isinstance(apply, Moments) and _coarsely(a, apply) else None
    for rounds in range(1, max_rounds + 1):
        # Just missed in float32, the tolerance may have been met: the estimate of its rounding was too kind.
        missed = bool((before < 4 * tol).any())
        if fine is a and rounding_blurs(theta, k, tol / 3 if missed else tol, eps):
            fine = a.double()
        error = column_errors(theta, residual, edge, k)
        degree, held = filter_degree(
            theta, error, edge, tol, coarse=rough is not None, fine=fine.dtype != a.dtype
        )
        z = filter_correction(rough or apply, z, residual.to(a), theta, edge, degree, held)
        dear = rough is not None or fine is not a
        if dear and rounds < max_rounds and float(error.max()) * _LEFT_OVER > tol:
            # Too far off for one filter: how good it is would be measured in vain.
            z, theta, residual, _ = _triplets(a, z)
            continue
        u, z, theta, bound, alone, residual = _measure(fine, apply, a.dtype, z, k, generator)
        resolved = theta[:, k - 1] > resolution
        # Rounding alone can turn vectors across a small gap by this much. Where it exceeds tol, or the cut splits a
        # cluster, what can be had is that the wanted vectors lie in the searched space to tol.
        gap = (theta[:, k - 1] - theta[:, k]).clamp_min(1e-300)
        turned = 16 * (theta[:, 0] * theta[:, k - 1]).clamp_min(0).sqrt() / gap
        floor = product_eps(a.device, fine.dtype) * turned
        # Twice unknown is stalled, too: too much of the wanted space is missing for the rounds that are left.
        stalled = (torch.isfinite(before) & (alone > before / 2)) | (measured & torch.isinf(alone))
        measured = True
        final = stalled | (rounds == max_rounds)
        tied = eps * turned >= 1  # by the rounding of A's own dtype, whatever residuals are taken in
        accepted = resolved & (alone <= tol) & ((bound <= tol) | (bound <= floor) | tied | final)
        if bool((accepted | ~resolved | stalled).all()) or rounds == max_rounds:
            break
        before = alone
    s = theta[:, :k].clamp_min(0).sqrt()
    return Leading(u=u, s=s.to(a), v=z[..., :k], bound=bound, accepted=accepted, rounds=rounds)


def _operator(a: Tensor, width: int) -> Operator:
    """``z -> aᵀ(a z)``, through the Gram matrix where forming it costs less than it saves over some ten products."""
    m, n = a.shape[-2:]
    if m * n < 10 * width * (2 * m - n):
        moments = gram(a)
        return Moments(moments, True, lambda z: moments @ z)
    # Each step of a filter reads the transpose: its rows are laid out once.
    turned = a.mT.contiguous() if in_kernel(a.mT, width) else a.mT
    return Moments(turned, False, lambda z: transposed_product(a, a @ z))


def _coarsely(a: Tensor, moments: Moments) -> bool:
    """Whether corrections are filtered with products whose factors are rounded to bfloat16."""
    return moments.formed and coarse_refusal(a.device, a.dtype, a.shape[-2] * a.shape[-1]) is None


def _rayleigh_ritz(
    y: Tensor, image_of: Operator, stiffness_of: Callable[[Tensor, Tensor], Tensor], eigen_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz on columns that need not be orthonormal.

    Returns the (orthonormalised if need be) columns y and their image, Ritz values (b, l) descending in float64
    on the host, and the coefficients q (b, l, l) of the Ritz vectors ``y q``.
    """
    try:
        image = image_of(y)
        theta, q = pencil(gram(y), stiffness_of(y, image), eigen_dtype)
    except torch.linalg.LinAlgError:
        y = orthonormal(y)
        image = image_of(y)
        theta, q = pencil(gram(y), stiffness_of(y, image), eigen_dtype)
    return y, image, theta, q.to(y.dtype)


def _triplets(a: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz with A itself in the span of y (b, n, l), in the dtype of ``a``.

    Returns Ritz vectors z (b, n, l), their values (b, l) float64 on the host, the residual ``C z - z theta`` (b, n, l),
    and left vectors (b, m, l).
    """
    y, image, theta, q = _rayleigh_ritz(y.to(a), lambda y: a @ y, lambda _, image: gram(image), torch.float64)
    z = y @ q
    s = theta.clamp_min(0).sqrt().unsqueeze(-2).clamp_min(torch.finfo(a.dtype).tiny).to(a)
    left = (image @ q).div_(s)
    # Aᵀ(A z)/s - z s, then times s: rounding stays relative to sigma_1 sigma_j rather than sigma_1 squared.
    return z, theta, (a.mT @ left).sub_(z * s).mul_(s), left


def _measure(
    a: Tensor, apply: Operator, dtype: torch.dtype, y: Tensor, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz with A itself, and how good it is.

    In the dtype of ``a``, which may be wider than ``dtype``, that of ``apply``.

    Returns u (b, m, k), all Ritz vectors z (b, n, l), and on the host theta (b, l) float64, the bound, and the bound on
    the distance of the wanted vectors from the searched space alone, (b,) each; and the residual ``C z - z theta``.
    """
    z, theta, residual, left = _triplets(a, y)
    p = max(k, (k + y.shape[-1]) // 2 // ALIGNED * ALIGNED)
    eps = product_eps(a.device, a.dtype)
    noise = 4 * eps * (theta[:, 0].clamp_min(0) * theta[:, k - 1].clamp_min(0)).sqrt()
    inner = z[..., :p].to(dtype)

    def clear(w: Tensor) -> Tensor:
        return w - inner @ transposed_product(inner, w)

    # Lanczos vectors that start outside the searched space stay there when every product is cleared of it.
    start = clear(random_start(z.shape[0], z.shape[1], generator, inner))
    steps = tridiagonal(lambda w: clear(apply(w)), start)
    coupling = z[..., k:p].mT @ residual[..., :k]
    diagonal, off_diagonal, *sizes = to_host([*steps, *residual_sizes(residual[..., :p], coupling, k)])
    left_over = ResidualSizes(residual.shape[-2], *sizes)
    beyond = norm_bound(diagonal, off_diagonal, z.shape[1] - p)
    beyond = beyond + 4 * product_eps(a.device, dtype) * theta[:, 0]
    bound, alone = ritz_bound(theta[:, :p], left_over, beyond, noise, k)
    # Left vectors: what of A z lies outside the true left space is at most sigma_{k+1} sin/s_k, plus rounding.
    ratio = ((theta[:, k] + left_over.total) / theta[:, k - 1].clamp_min(1e-300)).sqrt().clamp_min(1.0)
    rounding = eps * (math.sqrt(k) + 4 * (theta[:, 0] / theta[:, k - 1].clamp_min(1e-300)).sqrt())
    return left[..., :k], z, theta, bound * ratio + rounding, alone, residual
