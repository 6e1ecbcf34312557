"""Small matrices that one-sided Jacobi is tried on, and what is held against it: float64 LAPACK."""

from __future__ import annotations

import torch
from torch import Tensor

from rlspec.linalg.jacobi import Rotated
from rlspec.ops.reference import jacobi_ref

F32, F64 = torch.float32, torch.float64


def matrices(count: int, n: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(n)
    return torch.randn(count, n, n, dtype=F64, generator=g).to(dtype)


def basis(count: int, n: int, dtype: torch.dtype) -> Tensor:
    """Orthogonal, for a start."""
    return torch.linalg.qr(matrices(count, n, F64).mT).Q.to(dtype).contiguous()


def special(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """(n, n) each, held by their columns; n at least 6."""
    g = torch.Generator().manual_seed(n)
    u, v = torch.linalg.qr(torch.randn(2, n, n, dtype=F64, generator=g)).Q
    deficient = torch.linspace(3, 1, n, dtype=F64) * (torch.arange(n) < n // 2)
    shared = torch.where(torch.arange(n) < n // 2, 2.0, 1.0).to(F64)
    # In the tournament of 6 the last round sees none of these columns meet.
    three = torch.eye(n, dtype=F64)
    three = three[[0, 1, 3, 4, 2, *range(5, n)]]
    three[[0, 1, 4], :3] = torch.randn(3, 3, dtype=F64, generator=g)
    # Squares of all columns but one have no digits left.
    tiny = torch.finfo(dtype).tiny ** 0.5 / 64
    return {
        # Columns of one length that are not orthogonal: no angle is smaller than 45 degrees.
        "columns of one length": (torch.eye(n) + 0.5).to(dtype),
        "identity": torch.eye(n, dtype=dtype),
        "zero": torch.zeros(n, n, dtype=dtype),
        "deficient": ((u * deficient) @ v.T).to(dtype),
        "zero columns": torch.diag(deficient).to(dtype),
        "steep": ((u * torch.logspace(0, -30, n, dtype=F64)) @ v.T).to(dtype),
        "equal values": ((u * shared) @ v.T).to(dtype),
        "three columns": three.to(dtype),
        "columns that underflow": (u.T * torch.where(torch.arange(n) == 1, 1.0, tiny)[:, None]).to(dtype),
        "ascending": torch.diag(torch.arange(1.0, n + 1)).to(dtype),
    }


def worst(found: Rotated, g: Tensor, v: Tensor | None = None) -> float:
    """The largest error of values, of what U S Vᵀ leaves of A, and of orthogonality, over the size of the matrix where it
    has one, in units of √n times the dtype's rounding. LAPACK's own, in the same dtype, is up to 5, a random matrix's
    here up to 1.6."""
    n = g.shape[-1]
    values, _, _ = jacobi_ref(g, v)
    largest = values[:, :1].clamp_min(torch.finfo(F64).tiny)
    s, left = found.values.double(), found.left.double()
    errors = [(s - values).abs() / largest, _departure(left)]
    if v is not None:
        assert found.right is not None
        right = found.right.double()
        # A, whose product with V the rows of g are.
        a = g.double().mT @ v.double()
        errors += [((left.mT * s[:, None]) @ right - a).abs() / largest[..., None], _departure(right)]
    assert bool((found.values[:, 1:] <= found.values[:, :-1]).all()) and bool((found.values >= 0).all())
    of_each = torch.stack([error.flatten(1).amax(-1) for error in errors])
    return float(of_each.max()) / (n**0.5 * torch.finfo(g.dtype).eps)  # NaN where there is some


def _departure(rows: Tensor) -> Tensor:
    return (rows @ rows.mT - torch.eye(rows.shape[-1], dtype=rows.dtype)).abs()
