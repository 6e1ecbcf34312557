"""Subspace locking against float64 decompositions of both weights by LAPACK, and against planted rotations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spectra_toys import F64, flat_at_the_cut, random_update, stacked
from torch import Tensor

from rlspec.perturb.coordinates import Side
from rlspec.perturb.delta import DenseDelta
from rlspec.perturb.reference import Reference
from rlspec.spectra import subspaces
from rlspec.spectra.delta import measure_delta
from rlspec.spectra.exact import measure_exact
from rlspec.spectra.measurement import Measurement
from rlspec.spectra.subspaces import Subspaces, locking

Engine = Callable[..., Measurement]
ENGINES = [measure_delta, measure_exact]


def found(engine: Engine, reference: Reference, weights: list[Tensor]) -> Subspaces:
    delta = DenseDelta.between(torch.stack(weights), reference.W)
    kept = engine(reference, delta, subspaces=True).subspaces
    assert kept is not None
    return kept


def truth(now: Tensor, end: Tensor, k: int) -> tuple[float, float]:
    """Mean squared cosines of the leading left and right subspaces."""
    (u, _, v), (u_end, _, v_end) = (torch.linalg.svd(w.double(), full_matrices=False) for w in (now, end))
    pairs = ((u[:, :k], u_end[:, :k]), (v[:k].T, v_end[:k].T))
    left, right = (float((a.T @ b).square().sum()) / k for a, b in pairs)
    return left, right


def assert_true(engine: Engine, reference: Reference, now: list[Tensor], end: list[Tensor]) -> None:
    shared = locking(found(engine, reference, now), found(engine, reference, end))
    for i, pair in enumerate(zip(now, end, strict=True)):
        for side, right in zip((shared.left, shared.right), truth(*pair, reference.k), strict=True):
            if side is not None:
                assert abs(float(side[i]) - right) <= float(shared.error[i])


def trained(weight: Tensor, generator: torch.Generator, size: float = 0.03) -> tuple[Tensor, Tensor]:
    """A weight on the way, and one at the end of it."""
    way = random_update(weight, size, None, generator)
    now = weight + way
    return now, weight + 2.0 * way + random_update(weight, 0.3 * size, 3, generator)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (40, 64)], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_that_of_whole_decompositions(
    engine: Engine, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    for _ in range(8):
        weights = [flat_at_the_cut(*shape, generator).to(dtype) for _ in range(3)]
        pairs = [trained(weight.double(), generator) for weight in weights]
        now, end = ([w.to(dtype) for w in side] for side in zip(*pairs, strict=True))
        assert_true(engine, stacked(weights, dtype=dtype), now, end)


def test_the_comparison_notices_columns_past_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    right = subspaces._leading
    monkeypatch.setattr(subspaces, "_leading", lambda side, k, same: right(side, k + 1, same))
    with pytest.raises(AssertionError):
        test_it_is_that_of_whole_decompositions(measure_delta, (48, 48), F64)


def test_the_comparison_notices_the_reference_in_place_of_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = flat_at_the_cut(48, 48, generator)
    now, end = trained(weight, generator)
    with pytest.raises(AssertionError):
        reference = stacked([weight])
        shared = locking(found(measure_delta, reference, [now]), found(measure_delta, reference, [weight]))
        assert shared.left is not None
        assert abs(float(shared.left) - truth(now, end, reference.k)[0]) <= float(shared.error)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_planted_rotation_is_found_however_small(engine: Engine) -> None:
    """The k-th right vector turned by an angle into the next one: (k - 1 + cos²) / k, and nothing on the left."""
    m, k = 40, 8
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(m, m, dtype=F64, generator=generator)).Q for _ in range(2))
    s = torch.linspace(4.0, 1.0, m, dtype=F64)
    s[k:] *= 0.5

    def turned(angle: float) -> Tensor:
        plane = v[:, [k - 1, k]]
        turn = torch.tensor(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=F64
        )
        basis = v.clone()
        basis[:, [k - 1, k]] = plane @ turn
        return (u * s) @ basis.T

    reference = stacked([turned(0.0)], k)
    for first, last in ((1e-3, 3e-3), (2e-5, 1e-5), (0.02, 0.02 + 1e-5)):
        shared = locking(found(engine, reference, [turned(first)]), found(engine, reference, [turned(last)]))
        assert shared.left is not None and shared.right is not None
        wanted = 1.0 - math.sin(last - first) ** 2 / k
        assert abs(float(shared.left) - 1.0) <= float(shared.error)
        assert abs(float(shared.right) - wanted) <= float(shared.error)
        # Of the angle itself a thousandth; one minus the share has all the digits that float64 leaves.
        assert 1.0 - float(shared.right) == pytest.approx(1.0 - wanted, rel=2e-3, abs=1e-14)


def near_pair() -> tuple[Reference, list[Tensor], list[Tensor]]:
    """Two weights 3 % away from a reference with float32 factors, and 3e-6 from each other."""
    generator = torch.Generator().manual_seed(5)
    weight = flat_at_the_cut(64, 64, generator).float()
    now = weight.double() + random_update(weight.double(), 0.03, None, generator)
    end = now + random_update(weight.double(), 3e-6, None, generator)
    return stacked([weight.double()], dtype=torch.float32), [now], [end]


def test_neighbours_far_from_the_reference_are_told_apart() -> None:
    reference, now, end = near_pair()
    shared = locking(found(measure_exact, reference, now), found(measure_exact, reference, end))
    wanted = truth(now[0], end[0], reference.k)
    for side, right in zip((shared.left, shared.right), wanted, strict=True):
        assert side is not None and 1e-12 < 1.0 - right < 1e-8
        assert 1.0 - float(side) == pytest.approx(1.0 - right, rel=1e-3)


def test_products_in_the_dtype_of_the_factors_would_not_tell_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def narrow(a: Side, b: Side) -> Tensor:
        a, b = (replace(side, tail=side.tail.float()) for side in (a, b))
        return a.dot(b)

    monkeypatch.setattr(subspaces, "_product", narrow)
    with pytest.raises(AssertionError):
        test_neighbours_far_from_the_reference_are_told_apart()


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_a_stack_of_near_far_and_unchanged_weights_keeps_its_order(dtype: torch.dtype) -> None:
    """Large updates are decomposed, small ones solved for; the reference itself is what it is."""
    generator = torch.Generator().manual_seed(7)
    weights = [flat_at_the_cut(40, 56, generator).to(dtype) for _ in range(5)]
    sizes = [0.8, 0.0, 0.02, 0.9, 0.0]
    moved = [
        w + random_update(w.double(), size, None, generator).to(dtype) if size else w.clone()
        for w, size in zip(weights, sizes, strict=True)
    ]
    end = [w + random_update(w.double(), 0.05, None, generator).to(dtype) for w in weights]
    reference = stacked(weights, dtype=dtype)
    assert_true(measure_delta, reference, moved, end)
    assert_true(measure_delta, reference, end, moved)
    shared = locking(*2 * [found(measure_delta, reference, moved)])
    for side in (shared.left, shared.right):
        assert side is not None and torch.all(side > 1.0 - 1e-13)


def test_a_whole_side_has_none() -> None:
    generator = torch.Generator().manual_seed(9)
    weight = flat_at_the_cut(24, 40, generator)
    now, end = trained(weight, generator)
    for engine in ENGINES:
        reference = stacked([weight], 24)
        shared = locking(found(engine, reference, [now]), found(engine, reference, [end]))
        assert shared.left is None and shared.right is not None
        assert abs(float(shared.right) - truth(now, end, 24)[1]) <= float(shared.error)


def test_nothing_is_kept_where_it_is_not_asked_for() -> None:
    generator = torch.Generator().manual_seed(9)
    weight = flat_at_the_cut(24, 24, generator)
    delta = DenseDelta.between(torch.stack([weight + 1e-3]), stacked([weight]).W)
    for engine in ENGINES:
        assert engine(stacked([weight]), delta).subspaces is None
