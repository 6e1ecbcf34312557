"""The one door to dense decompositions: which routine does them, on which machine, and how exactly.

Only this file calls torch's eigen- and singular value solvers and its QR. Two ideas serve everywhere. The eigenvectors
of a Gram matrix are the singular vectors, in half the time of LAPACK's SVD; left vectors got from them are orthonormal
to ``eps (σ_1/σ_n)²`` (eps is float64's, 2.2e-16), so the conditioning decides. And on a device small decompositions go
to the host in one transfer and come back: there torch loops over a batch, or takes batched Jacobi routines that were
seen to lose orthogonality silently, and a card may have no float64 to speak of.

=====================  ==========================================  ===============================================
function               route                                       exact to (σ relative to σ_1; departure of UᵀU)
=====================  ==========================================  ===============================================
`eigh`, `eigvalsh`     LAPACK                                      rounding of the dtype
`lapack_svd`           LAPACK; Gram and QR where that gives up     rounding; 1e-8 in σ where it gave up
`lapack_values`        LAPACK                                      rounding
`thin_svd`             LAPACK up to r = `SMALL`, then Gram with    rounding x σ_1/σ_r in σ; the departure asked for
                       a Newton step; LAPACK where σ_1/σ_r > 1e5
`leading_by_gram`      Gram of float32 data, σ_1/σ_k up to 1e4     2e-8: nothing to float32; it says where it fails
`core_svd`             Gram up to σ_1/σ_w = 30, then LAPACK        rounding in σ; 2e-13
`singular_values`      LAPACK up to 64 columns, then Gram          1e-8 in the smallest, rounding in the largest
`pencil`               Cholesky, LAPACK                            rounding of the dtype x condition of the basis
`householder`          LAPACK                                      rounding
`orth.orthonormal`     Cholesky twice, `householder` if it fails   rounding
=====================  ==========================================  ===============================================

On a device every line but the last two's Cholesky, triangular solves and products runs on the host. Callers with
several decompositions to do, or decisions to take, wrap them in :func:`on_host`, so that they share a transfer. Where
``RLSPEC_SOLVER`` chooses a solver of the device (:mod:`rlspec.linalg.solvers`), `eigh`, `eigvalsh` and `core_svd` stay
there.

Cores are nearly diagonal, and a refinement that starts there needs products only (Ogita and Aishima, Japan J. Indust.
Appl. Math. 35, 2018, and 36, 2019). On a CPU it does not pay: `eigh` costs as much as 9 products of two cores at w = 145,
6 at 400 and 4.4 at 900 (one thread, AVX-512), so the Gram route takes 11, 8 and 6.4 in all. Two refinement steps of the
Gram matrix take 11, of the SVD itself 16, and values closer than the off-diagonal need small solves before, or diverge.

Axes: ``...`` or ``L`` a batch, ``m`` rows, ``n`` columns, ``r = min(m, n)``, ``w`` the size of a core.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlspec.linalg import solvers
from rlspec.linalg.scaling import into_range, multiplied, powers_of_two
from rlspec.linalg.transfer import to_device, to_host
from rlspec.linalg.workers import by_matrix
from rlspec.ops.gram import gram

# Up to this r LAPACK's SVD in float64 takes well under a second.
SMALL = 384
# Up to this many columns LAPACK is as fast as the Gram matrix for singular values alone.
_DIRECT = 64
# How far left vectors from the Gram matrix may be from orthonormal: nothing to float32, and rounding to float64.
FLOAT32, FLOAT64 = 1e-8, 1e-14
# The largest σ_1/σ at which the Gram matrix serves: a core as it is, float32 data, float64 data with a Newton step.
_CORE_CONDITION, _LEADING_CONDITION, _MENDED_CONDITION = 30.0, 1e4, 1e5
# The largest departure that one Newton step mends.
_MENDABLE = 3e-5

Factors = tuple[Tensor, Tensor, Tensor]


def on_host(solve: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``solve(*tensors)`` on the host, in float64: one transfer there, and one back to the device of the first.

    On the CPU nothing is moved or converted. Where a device solves for itself, `solve` runs there. Elsewhere its small
    matrices are solved side by side, see :func:`workers.by_matrix`.
    """
    if not tensors[0].is_cuda:
        return solve(*tensors)
    if solvers.solver_for(tensors[0].device) is not None:
        return solve(*(t.double() for t in tensors))
    return to_device(by_matrix(solve, *to_host(tensors)), tensors[0])


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of symmetric (..., n, n), in its dtype."""
    if a.is_cuda:
        values, vectors = solvers.eigh(a) or to_device(by_matrix(eigh, a.cpu()), a)
        return values, vectors
    values, vectors = torch.linalg.eigh(a)
    return values, vectors


def eigvalsh(a: Tensor) -> Tensor:
    """Eigenvalues (..., n), ascending, of symmetric (..., n, n), in its dtype."""
    if a.is_cuda:
        found = solvers.eigh(a)
        return eigvalsh(a.cpu()).to(a.device) if found is None else found[0]
    return torch.linalg.eigvalsh(a)


def householder(a: Tensor) -> tuple[Tensor, Tensor]:
    """Q (..., m, r), orthonormal whatever the rank of ``a`` (..., m, n), and upper triangular R (..., r, n)."""
    if a.is_cuda:
        q, upper = to_device(householder(a.cpu()), a)
        return q, upper
    q, upper = torch.linalg.qr(a)
    return q, upper


def lapack_svd(a: Tensor) -> Factors:
    """Thin SVD ``a = U diag(S) Vh`` of every matrix of a batch, in the precision of its dtype.

    LAPACK's divide and conquer (``gesdd``) does the work. It is known to fail on rare matrices; those are
    decomposed again from their Gram matrix in float64, so that the call never fails for want of convergence.

    Args:
        a: shape (..., m, n), finite. float64 is computed in float64, every narrower dtype in float32.

    Returns:
        U (..., m, r), S (..., r) descending, Vh (..., r, n), all float64 or all float32.
    """
    a = a if a.dtype == torch.float64 else a.to(torch.float32)
    if a.is_cuda:
        u, s, vh = to_device(lapack_svd(a.cpu()), a)
        return u, s, vh
    try:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
    except torch.linalg.LinAlgError:
        return _svd_by_gram_and_qr(a)
    return u, s, vh


def lapack_values(a: Tensor) -> Tensor:
    """Singular values of (..., m, n), descending, (..., r), to the rounding of its dtype: small ones are right too."""
    return lapack_values(a.cpu()).to(a.device) if a.is_cuda else torch.linalg.svdvals(a)


def thin_svd(a: Tensor, *, orthonormal: float = FLOAT64) -> Factors:
    """Thin SVD of every matrix of a finite float64 batch: U (..., m, r), S (..., r) descending, Vh (..., r, n), float64.

    By the Gram matrix where the size makes that pay and the conditioning allows it, else by LAPACK's SVD; large
    matrices one by one.

    Args:
        a: (..., m, n) float64.
        orthonormal: departure of UᵀU from the identity that is good enough.
    """
    if a.is_cuda:
        u, s, vh = to_device(thin_svd(a.cpu(), orthonormal=orthonormal), a)
        return u, s, vh
    if min(a.shape[-2:]) <= SMALL:
        return lapack_svd(a)
    if a.ndim == 2:
        a, power = into_range(a)
        u, s, vh = _mended_svd(a, orthonormal) or lapack_svd(a)
        return u, multiplied(s, power), vh
    lead, (m, n) = a.shape[:-2], a.shape[-2:]
    parts = [thin_svd(one, orthonormal=orthonormal) for one in a.reshape(-1, m, n)]
    u, s, vh = (torch.stack(x).reshape(*lead, *x[0].shape) for x in zip(*parts, strict=True))
    return u, s, vh


def leading_by_gram(a: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leading k triplets of float32 data from the float64 eigenvectors of the smaller Gram matrix.

    Squaring costs nothing here: float64 has twice float32's digits. Wanted vectors come out more accurate than from
    a float32 ``gesdd``, and faster, above all for matrices far from square.

    Args:
        a: (b, m, n) with m >= n, float32.
        k: 1 <= k <= n.

    Returns:
        u (b, m, k), s (b, n) all singular values, v (b, n, k), float64, and whether each result may be used (b,):
        False where sigma_k is too small beside sigma_1 for its square to be resolved.
    """
    wide = a.to(torch.float64)
    squares, v = _descending(gram(wide))
    s = squares.clamp_min(0).sqrt()
    v = v[..., :k]
    image, lengths = _image(wide, v)
    usable = lengths[..., k - 1] * _LEADING_CONDITION > lengths[..., 0]
    u = image / lengths.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-2)
    u, s[..., :k], v = _in_order(u, lengths, v)
    return u, s, v, usable


def core_svd(a: Tensor) -> Factors:
    """SVD ``a = u diag(s) zᵀ`` of (L, w, w) float64 cores: u, s descending, z, float64.

    By the Gram matrix where the core is well conditioned, which a core of leading directions mostly is: LAPACK's SVD
    takes twice as long. Each core takes its own route, whatever its neighbours.
    """
    if a.is_cuda:
        u, s, z = solvers.core_svd(a) or to_device(by_matrix(core_svd, a.cpu()), a)
        return u, s, z
    a, power = into_range(a)
    squares, z = _descending(gram(a))
    largest, smallest = squares[..., 0], squares[..., -1]
    hard = (smallest * _CORE_CONDITION**2 < largest) | (largest == 0)
    if bool(hard.all()):
        u, s, zh = lapack_svd(a)
        return u, multiplied(s, power), zh.mT
    image, s = _image(a, z)
    u, s, z = _in_order(image / s.unsqueeze(-2), s, z)
    if bool(hard.any()):
        u[hard], s[hard], zh = lapack_svd(a[hard])
        z[hard] = zh.mT
    return u, multiplied(s, power), z


def singular_values(a: Tensor) -> Tensor:
    """Singular values of (..., m, n), descending, (..., r) float64.

    More than a few dozen go through the float64 Gram matrix, which squares their range: values under 1e-8 of the
    largest are rounding.
    """
    a = a.double()
    if min(a.shape[-2:]) <= _DIRECT:
        return lapack_values(a)
    a, power = into_range(a)
    return multiplied(values_of_gram(small_gram(a)), power)


def small_gram(a: Tensor) -> Tensor:
    """The smaller of ``aᵀa`` and ``aaᵀ``, (..., r, r)."""
    return gram(a if a.shape[-2] >= a.shape[-1] else a.mT)


def values_of_gram(moments: Tensor) -> Tensor:
    """Singular values, descending, of what has the Gram matrix (..., n, n); 1e-8 of the largest is rounding."""
    return eigvalsh(moments).flip(-1).clamp_min(0.0).sqrt()


def pencil(moments: Tensor, stiffness: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Solve ``stiffness q = moments q diag(theta)``, moments positive definite.

    Args:
        moments, stiffness: (b, l, l) symmetric.
        dtype: of the eigen-solve; the transformation runs in float64.

    Returns:
        theta (b, l) descending, on the host, and q (b, l, l), float64.

    Raises:
        torch.linalg.LinAlgError: moments are singular to working precision.
    """
    moments, stiffness = moments.double(), stiffness.double()
    lower, info = torch.linalg.cholesky_ex(moments)
    half = torch.linalg.solve_triangular(lower, stiffness, upper=False)
    core = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    core, info = to_host([(core + core.mT) / 2, info])
    if bool((info != 0).any()):
        raise torch.linalg.LinAlgError("basis is singular to working precision")
    theta, q = _descending(core.to(dtype))
    (there,) = to_device([q], moments)
    return theta.double(), torch.linalg.solve_triangular(lower.mT, there.double(), upper=True)


def _descending(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = eigh(symmetric)
    return values.flip(-1), vectors.flip(-1)


def _image(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``a v`` for right singular vectors v, and the lengths of its columns: singular values that no square rounded."""
    image = a @ v
    return image, image.norm(dim=-2)


def _in_order(u: Tensor, s: Tensor, v: Tensor) -> Factors:
    """Triplets by descending s: lengths of columns of equal singular values come in the order of their rounding."""
    if bool((s[..., 1:] <= s[..., :-1]).all()):
        return u, s, v
    s, order = s.sort(dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2)
    return torch.take_along_dim(u, columns, -1), s, torch.take_along_dim(v, columns, -1)


def _mended_svd(a: Tensor, orthonormal: float) -> Factors | None:
    """SVD of one float64 matrix by the Gram matrix, or None where the conditioning forbids it."""
    if a.shape[0] < a.shape[1]:
        turned = _mended_svd(a.mT, orthonormal)
        return None if turned is None else (turned[2].mT, turned[1], turned[0].mT)
    squares, v = _descending(gram(a))
    s = squares.clamp_min(0.0).sqrt()
    if float(s[-1]) * _MENDED_CONDITION <= float(
        s[0]
    ):  # the smallest left vectors would lose their orthogonality
        return None
    image, s = _image(a, v)
    u = image / s
    expected = torch.finfo(a.dtype).eps * (float(s[0]) / float(s[-1])) ** 2
    if expected > orthonormal:
        # One Newton step for the polar factor: departure d becomes 3/4 d².
        departure = gram(u)
        departure.diagonal().sub_(1.0)
        if float(departure.abs().max()) > _MENDABLE:
            return None
        u = u - 0.5 * u @ departure
    u, s, v = _in_order(u, s, v)
    return u, s, v.mT


def _svd_by_gram_and_qr(a: Tensor) -> Factors:
    """:func:`lapack_svd` without LAPACK's SVD: σ right to 1e-8 of the largest, U and V orthonormal whatever the rank."""
    if a.shape[-2] < a.shape[-1]:
        u, s, vh = _svd_by_gram_and_qr(a.mT)
        return vh.mT.contiguous(), s, u.mT.contiguous()
    scale = powers_of_two(a.to(torch.float64))
    wide = a.to(torch.float64) / scale[..., None, None]
    _, v = _descending(wide.mT @ wide)
    # a v is orthogonal up to rounding; a QR factorisation makes that exact, zero columns included.
    u, upper = householder(wide @ v)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    s, order = diagonal.abs().sort(dim=-1, descending=True)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(diagonal.dtype)
    u = torch.take_along_dim(u * sign.unsqueeze(-2), order.unsqueeze(-2), dim=-1)
    v = torch.take_along_dim(v, order.unsqueeze(-2), dim=-1)
    return u.to(a.dtype), multiplied(s, scale).to(a.dtype), v.mT.to(a.dtype)
