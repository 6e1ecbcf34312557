"""What gpu_report.py checks and times of a truncated decomposition: the operations that its rounds are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_cases import SHARE, Case, by_backend, planted, worst
from shapes import Shape
from torch import Tensor

from rlspec.linalg.products import transposed_product
from rlspec.linalg.randomized import sketch_width
from rlspec.ops.chebyshev_step import Correction, Moments, chebyshev_step, sketch
from rlspec.ops.draws import Signs
from rlspec.ops.gram import gram, product_eps
from rlspec.ops.reference import chebyshev_step_ref, gram_ref, residual_norms_ref
from rlspec.ops.residual_norms import residual_norms

# Of the wanted triplets' share, where two products with A cost less than one with AᵀA.
_SMALL_SHARE = 0.04


def iteration_cases(size: int, layers: int, device: torch.device) -> Iterator[Case]:
    """Operations of `rlspec.svd`, on stacks of float32 matrices (L, n, n). The first matrix is checked."""
    factors = planted(Shape("", "q", size, size, layers), layers, device)
    matrices = torch.stack([(u * s.to(u)) @ vh for u, s, vh in factors])
    k, small = (max(1, round(share * size)) for share in (SHARE, _SMALL_SHARE))
    width = sketch_width(k, size)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(layers, size, width, generator=generator).to(device)
    yield _gram_case(matrices)
    yield _gram_case(block)
    moments = matrices.mT @ matrices
    formed = Moments(moments, True, lambda z: moments @ z)
    yield _step_case(formed, moments[:1], block)
    yield _sketch_case(formed, moments[:1], width)
    turned = matrices.mT.contiguous()
    apply = Moments(turned, False, lambda z: transposed_product(matrices, matrices @ z))
    few = block[..., : sketch_width(small, size)].contiguous()
    yield _step_case(apply, matrices[:1].double().mT @ matrices[:1].double(), few)
    yield _residual_case(matrices, factors, k)


def _gram_case(a: Tensor) -> Case:
    matrices, m, n = a.shape
    notes: list[str] = []
    title = f"gram, {matrices} x {m} x {n} float32"

    def error() -> float:
        sizes = gram_ref(a[:1].abs())
        return _told(title, notes, gram(a)[:1], gram_ref(a[:1]), sizes, m)

    return Case(
        title,
        by_backend(a.device, lambda: gram(a)) | {"torch.bmm": lambda: a.mT @ a},
        error,
        bytes=4.0 * matrices * (m * n + n * n),
        flops=1.0 * matrices * m * n * (n + 1),  # each pair of columns once
        notes=notes,
    )


def _step_case(apply: Moments, moments: Tensor, block: Tensor) -> Case:
    """A degree with a correction, all of whose operands a kernel reads once; ``moments`` is C of the first matrix."""
    matrices, n, c = block.shape
    generator = torch.Generator().manual_seed(1)
    previous, residual = torch.randn(2, *block.shape, generator=generator).to(block)
    ratio, following = torch.rand(2, matrices, 1, c, generator=generator).to(block)
    edge = 4.0 * apply.matrix.new_ones(matrices, 1, 1)
    correction = Correction(residual, ratio, following)
    notes: list[str] = []
    operator = "C stored" if apply.formed else "Aᵀ(A y)"
    title = f"chebyshev_step, {operator}, {matrices} x {n} x {n} float32, {c} columns"

    def error() -> float:
        found = chebyshev_step(apply, block, previous, edge, correction)[:1]
        first = (moments, block[:1], previous[:1], edge[:1])
        part = Correction(residual[:1], ratio[:1], following[:1])
        # The terms' sizes: their signs are such that none cancels.
        sizes = chebyshev_step_ref(
            _sizes(apply, moments),
            block[:1].abs(),
            -previous[:1].abs(),
            edge[:1],
            Correction(part.residual.abs(), part.ratio, part.following),
        )
        sizes = sizes + 4 * part.following.double() * block[:1].double().abs()  # of the step's - 2 y
        return _told(
            title, notes, found, chebyshev_step_ref(*first, part), sizes, (1 if apply.formed else 2) * n
        )

    products = 1 if apply.formed else 2
    return Case(
        title,
        by_backend(block.device, lambda: chebyshev_step(apply, block, previous, edge, correction)),
        error,
        bytes=4.0 * matrices * (products * n * n + (3 + products) * n * c),
        flops=2.0 * products * matrices * n * n * c,
        notes=notes,
    )


def _sketch_case(apply: Moments, moments: Tensor, c: int) -> Case:
    """The first step of a filter, the sketch drawn for it: as bits on the device, or as numbers on the host."""
    matrices, n, _ = apply.matrix.shape
    edge = 4.0 * apply.matrix.new_ones(matrices, 1, 1)
    notes: list[str] = []
    title = f"chebyshev_step, first of a sketch, {matrices} x {n} x {n} float32, {c} columns"
    signs = Signs((5, -7), (matrices, n, c))

    def run() -> Tensor:
        return chebyshev_step(apply, sketch(apply, signs, edge), None, edge)

    def error() -> float:
        drawn = signs.dense(moments.double())[:1]
        exact = 2 / edge[:1].double() * (moments.double() @ drawn) - drawn
        sizes = 2 / edge[:1].double() * (moments.double().abs() @ drawn.abs()) + 1.0
        return _told(title, notes, run()[:1], exact, sizes, n)

    return Case(
        title,
        by_backend(apply.matrix.device, run),
        error,
        bytes=4.0 * matrices * (n * n + n * c * (1 + 2 / 32)),
        flops=2.0 * matrices * n * n * c,
        notes=notes,
    )


def _sizes(apply: Moments, moments: Tensor) -> Tensor:
    """Entries of C, or what terms of both products add up to."""
    if apply.formed:
        return moments.double().abs()
    turned = apply.matrix[:1].double().abs()
    return turned @ turned.mT


def _residual_case(matrices: Tensor, factors: list[tuple[Tensor, Tensor, Tensor]], k: int) -> Case:
    """Of planted triplets, which leave rounding over: what a decomposition ends with."""
    layers, m, n = matrices.shape
    u = torch.stack([factor[0][:, :k] for factor in factors])
    s = torch.stack([factor[1][:k].to(u) for factor in factors])
    v = torch.stack([factor[2][:k].mT for factor in factors])
    notes: list[str] = []
    title = f"residual_norms, {layers} x {m} x {n} float32, {k} triplets"

    def error() -> float:
        a, left, right = (t[:1].double().abs() for t in (matrices, u, v))
        value = s[:1].double().unsqueeze(-2)
        sizes = torch.maximum(
            (a @ right + left * value).norm(dim=-2), (a.mT @ left + right * value).norm(dim=-2)
        )
        found = residual_norms(matrices, u, s, v)[:1]
        truth = residual_norms_ref(matrices[:1], u[:1], s[:1], v[:1])
        return _told(title, notes, found, truth, sizes, max(m, n))

    return Case(
        title,
        by_backend(matrices.device, lambda: residual_norms(matrices, u, s, v)),
        error,
        bytes=8.0 * layers * (m * n + (m + n) * k),
        flops=4.0 * layers * m * n * k,
        notes=notes,
    )


def _told(title: str, notes: list[str], found: Tensor, truth: Tensor, sizes: Tensor, inner: int) -> float:
    """The error over what sums of ``inner`` terms may lose; and, in the notes, over what `rlspec.svd` has for rounding
    in its bounds, which is the same for any number of terms."""
    counted = worst(found, truth, product_eps(found.device, found.dtype) * sizes)
    notes[:] = [f"{title}: the largest error is {counted:.2g} product_eps of the sizes of its terms."]
    return worst(found, truth, (inner + 8) * 2.0**-20 * sizes)
