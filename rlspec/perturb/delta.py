"""The update E = W - W_ref as an operator: all that the solver asks of it are products, norms and counts.

Axes: ``L`` matrices, ``m`` by ``n`` each; ``c`` columns of a block; ``q`` the rank of a low-rank update.

* :class:`DenseDelta` holds E, or was handed it (random draws, rounding errors);
* :class:`PairDelta` holds W and W_ref and forms E block by block inside each product;
* :class:`LowRankDelta` holds the factors of E = s B A (LoRA, arXiv 2106.09685) and never forms it.

An update whose parts lie on several ranks is one more class with the same members: products of parts, summed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlspec.backend import row_blocks
from rlspec.linalg.coarse import coarse_matmul, coarse_rmatmul
from rlspec.linalg.products import transposed_product
from rlspec.linalg.transfer import to_host
from rlspec.ops.delta_matmul import delta_matmul, delta_rmatmul, in_kernel
from rlspec.ops.delta_stats import DeltaStats, delta_dtype, delta_stats
from rlspec.perturb.batch import take

UNCHANGED_ETA = (
    1e-3  # an entry moved by less than this share of its size counts as unchanged (arXiv 2511.08567)
)
# Entries formed at once where an update is counted that is not stored: temporaries that stay in a processor's cache, and
# enough to keep a device busy.
_BLOCK, _DEVICE_BLOCK = 1 << 18, 1 << 26


@dataclass(frozen=True)
class UpdateStats:
    """Entrywise statistics of an update, on the host; every one is (L,) float64."""

    delta_frobenius: Tensor
    weight_frobenius: Tensor  # of the current weight
    reference_frobenius: Tensor
    sparsity: Tensor  # share of entries unchanged

    def select(self, positions: Sequence[int]) -> UpdateStats:
        """The matrices of the given positions."""
        return UpdateStats(*(take(getattr(self, f.name), positions) for f in fields(self)))

    @classmethod
    def joined(cls, parts: list[UpdateStats]) -> UpdateStats:
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Delta(Protocol):
    """E of L matrices (m, n) on one device. Products are taken in ``dtype`` and returned in it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, m, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the products: float32 or float64, or bfloat16 where factors are rounded to it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def stats(self) -> UpdateStats:
        """Norms and counts. Where E was handed over by itself, ``weight_frobenius`` and ``sparsity`` are NaN."""

    def matmul(self, x: Tensor) -> Tensor:
        """E x for x (L, n, c): (L, m, c)."""

    def rmatmul(self, y: Tensor) -> Tensor:
        """Eᵀ y for y (L, m, c): (L, n, c)."""

    def to(self, dtype: torch.dtype) -> Delta:
        """The same with products in another dtype. In bfloat16, E and the block are rounded to it and products come in
        float32 (``linalg.coarse``), where E is stored; elsewhere products stay as they are."""

    def select(self, positions: Sequence[int]) -> Delta:
        """The matrices of the given positions, which do not repeat; all of them without a copy."""

    def dense(self) -> Tensor:
        """E itself, (L, m, n) in ``dtype``: for what needs every entry, such as a full decomposition."""

    def weight(self) -> Tensor:
        """The current weights W_ref + E, (L, m, n) float64: likewise."""


@dataclass(frozen=True)
class DenseDelta:
    """E stored, (L, m, n) float32, float64 or bfloat16, with the weights that it is the difference of.

    ``current`` (L, m, n) is W in its own dtype, or None: then W is ``reference`` + E.
    """

    values: Tensor
    stats: UpdateStats
    reference: Tensor
    current: Tensor | None = None

    @classmethod
    def between(cls, weight: Tensor, reference: Tensor, *, eta: float = UNCHANGED_ETA) -> DenseDelta:
        """E = ``weight`` - ``reference``, (L, m, n) of any floating dtypes; see ``ops.delta_stats``."""
        values = torch.empty(weight.shape, dtype=delta_dtype(weight, reference), device=weight.device)
        stats = _stats(delta_stats(weight, reference, eta=eta, out=values), values)
        return cls(values, stats, reference, weight)

    @classmethod
    def alone(cls, values: Tensor, reference: Tensor, reference_frobenius: Tensor) -> DenseDelta:
        """An E (L, m, n) that is no difference of stored weights: its size says nothing of theirs."""
        unknown = torch.full_like(reference_frobenius, torch.nan)
        (norm,) = to_host([frobenius(values)])
        return cls(values, UpdateStats(norm, unknown, reference_frobenius, unknown), reference)

    @property
    def shape(self) -> tuple[int, int, int]:
        return _shape(self.values)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def matmul(self, x: Tensor) -> Tensor:
        return coarse_matmul(self.values, x) if self.dtype == torch.bfloat16 else self.values @ x

    def rmatmul(self, y: Tensor) -> Tensor:
        coarse = self.dtype == torch.bfloat16
        return coarse_rmatmul(self.values, y) if coarse else transposed_product(self.values, y)

    def to(self, dtype: torch.dtype) -> DenseDelta:
        return self if dtype == self.values.dtype else replace(self, values=self.values.to(dtype))

    def select(self, positions: Sequence[int]) -> DenseDelta:
        if len(positions) == self.values.shape[0]:
            return self
        current = None if self.current is None else take(self.current, positions)
        values, reference = take(self.values, positions), take(self.reference, positions)
        return DenseDelta(values, self.stats.select(positions), reference, current)

    def dense(self) -> Tensor:
        return self.values

    def weight(self) -> Tensor:
        if self.current is not None:
            return self.current.double()
        return self.reference.double() + self.values.double()


@dataclass(frozen=True)
class PairDelta:
    """E of two stored stacks of weights, formed inside each product and never kept.

    ``current`` and ``reference`` are (L, m, n); their difference is taken as ``ops.delta_stats`` takes it.
    """

    current: Tensor
    reference: Tensor
    dtype: torch.dtype = torch.float32

    @cached_property
    def stats(self) -> UpdateStats:
        return _stats(delta_stats(self.current, self.reference, eta=UNCHANGED_ETA), self.current)

    @property
    def shape(self) -> tuple[int, int, int]:
        return _shape(self.current)

    @property
    def device(self) -> torch.device:
        return self.current.device

    def matmul(self, x: Tensor) -> Tensor:
        return delta_matmul(self.current, self.reference, x.to(self.dtype))

    def rmatmul(self, y: Tensor) -> Tensor:
        return delta_rmatmul(self.current, self.reference, y.to(self.dtype))

    def to(self, dtype: torch.dtype) -> PairDelta:
        return (
            self if dtype in (self.dtype, torch.bfloat16) else PairDelta(self.current, self.reference, dtype)
        )

    def select(self, positions: Sequence[int]) -> PairDelta:
        if len(positions) == self.current.shape[0]:
            return self
        return PairDelta(take(self.current, positions), take(self.reference, positions), self.dtype)

    def dense(self) -> Tensor:
        return DenseDelta.between(self.current, self.reference).values.to(self.dtype)

    def weight(self) -> Tensor:
        return self.current.double()


@dataclass(frozen=True)
class LowRankDelta:
    """E = scale B A on top of ``reference`` (L, m, n): the weights that an adapter of rank q stands for.

    ``B`` (L, m, q) and ``A`` (L, q, n) are float32 or float64 alike, ``scale`` is LoRA's alpha / q or what takes its
    place. Nothing of the size of E is stored: a product costs (m + n) q entries a column, and counts form some rows
    at a time.
    """

    B: Tensor
    A: Tensor
    scale: float
    reference: Tensor

    @classmethod
    def stacked(cls, factors: Sequence[tuple[Tensor, Tensor]], reference: Tensor) -> LowRankDelta:
        """Of L pairs B (m, q), A (q, n) of ranks that may differ, with their scales in them; zeros fill up."""
        q = max(left.shape[1] for left, _ in factors)
        lefts = [pad(left, (0, q - left.shape[1])) for left, _ in factors]
        rights = [pad(right, (0, 0, 0, q - right.shape[0])) for _, right in factors]
        return cls(torch.stack(lefts), torch.stack(rights), 1.0, reference)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.B.shape[0], int(self.B.shape[-2]), int(self.A.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def matmul(self, x: Tensor) -> Tensor:
        return self.B @ ((self.A @ x) * self.scale)

    def rmatmul(self, y: Tensor) -> Tensor:
        return self.A.mT @ ((self.B.mT @ y) * self.scale)

    def to(self, dtype: torch.dtype) -> LowRankDelta:
        return (
            self
            if dtype in (self.dtype, torch.bfloat16)
            else replace(self, B=self.B.to(dtype), A=self.A.to(dtype))
        )

    def select(self, positions: Sequence[int]) -> LowRankDelta:
        if len(positions) == self.B.shape[0]:
            return self
        b, a, reference = (take(t, positions) for t in (self.B, self.A, self.reference))
        return LowRankDelta(b, a, self.scale, reference)

    def dense(self) -> Tensor:
        return (self.B * self.scale) @ self.A

    def weight(self) -> Tensor:
        return self.reference.double() + self.to(torch.float64).dense()

    @cached_property
    def stats(self) -> UpdateStats:
        matrices, m, n = self.shape
        dtype = delta_dtype(self.reference, self.reference)
        sums = torch.zeros(4, matrices, dtype=torch.float64, device=self.B.device)
        factors = self.to(dtype)
        most = _BLOCK if self.B.device.type == "cpu" else _DEVICE_BLOCK
        for block in row_blocks(m, matrices * n, most):
            e = (factors.B[:, block] * self.scale) @ factors.A
            ref = self.reference[:, block].to(dtype)
            w = ref + e
            # Rows are summed in the dtype, their totals in float64.
            squares = [torch.linalg.vector_norm(x, dim=-1).double().square().sum(-1) for x in (e, w, ref)]
            unchanged = e.abs() <= UNCHANGED_ETA * torch.maximum(w.abs(), ref.abs())
            sums += torch.stack([*squares, torch.count_nonzero(unchanged, dim=(-2, -1)).double()])
        return _stats(DeltaStats(*sums), self.reference)


def delta_between(weight: Tensor, reference: Tensor) -> DenseDelta | PairDelta:
    """E = ``weight`` - ``reference``, (L, m, n), of which products are wanted: stored, or, where a kernel forms it in
    registers as fast as it would be read, not."""
    dtype = delta_dtype(weight, reference)
    if in_kernel(weight, reference, dtype):
        return PairDelta(weight, reference, dtype)
    return DenseDelta.between(weight, reference)


def _stats(sums: DeltaStats, like: Tensor) -> UpdateStats:
    """Norms and shares from sums, which reach the host in one transfer."""
    delta_sq, weight_sq, reference_sq, unchanged = to_host(list(sums))
    entries = like.shape[-1] * like.shape[-2]
    return UpdateStats(delta_sq.sqrt(), weight_sq.sqrt(), reference_sq.sqrt(), unchanged.double() / entries)


def frobenius(a: Tensor) -> Tensor:
    """Frobenius norm of (..., m, n), as float64. Row sums are float32 at worst, the total is float64."""
    return norm_of_rows(row_norms(a))


def row_norms(a: Tensor) -> Tensor:
    """(..., m) the part of :func:`frobenius` that reads the matrix."""
    return torch.linalg.vector_norm(a, dim=-1)


def norm_of_rows(norms: Tensor) -> Tensor:
    """The rest of :func:`frobenius`, which may be left to the host."""
    return norms.double().square().sum(-1).sqrt()


def _shape(stack: Tensor) -> tuple[int, int, int]:
    matrices, m, n = stack.shape
    return matrices, m, n
