"""Null baselines: how far leading subspaces turn for reasons that mean nothing.

A rotation is worth a thought only beside two others: the one that rounding the weights to bfloat16 causes, and
the one that a random update of the same Frobenius norm causes. Both are measured by the same engine, from the
same reference.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlspec.perturb.delta import Delta, DenseDelta
from rlspec.perturb.reference import Reference
from rlspec.spectra.measurement import Measurement


@dataclass(frozen=True)
class Nulls:
    """Mean principal angles (rad, averaged over the sides that have any) of L matrices; float64.

    ``measured`` (L,) is the weights' own; ``rounding`` (L,) that of their bfloat16 rounding error alone, 0 where
    they hold nothing finer; ``random`` (D, L) those of D Gaussian updates of the measured update's norm.
    """

    measured: Tensor
    rounding: Tensor
    random: Tensor

    @property
    def percentile(self) -> Tensor:
        """(L,) percentage of the random updates that turn the subspaces less than the measured one."""
        return 100.0 * (self.random < self.measured).double().mean(dim=0)


def rotation(measurement: Measurement) -> Tensor | None:
    """(L,) mean principal angle, averaged over the sides that have angles; None if neither has."""
    sides = [s for s in (measurement.sines_left, measurement.sines_right) if s is not None]
    if not sides:
        return None
    return torch.stack([torch.asin(s.double().clamp(0.0, 1.0)).mean(-1) for s in sides]).mean(0)


def null_rotations(
    engine: Callable[[Reference, Delta], Measurement],
    reference: Reference,
    weight: Tensor,
    measured: Measurement,
    *,
    draws: int,
    seed: int = 0,
) -> Nulls | None:
    """Null baselines of a stack; None where no side has angles.

    Args:
        engine: what measured the weights, ``measure_delta`` or ``measure_exact``.
        weight: (L, m, n), the weights that ``measured`` is of.
        draws: random updates per matrix. They depend on (seed, name, draw) alone.
    """
    own = rotation(measured)
    if own is None:
        return None
    change = measured.update

    def turned(update: Tensor) -> Tensor:
        delta = DenseDelta.alone(update, reference.W, change.reference_frobenius)
        found = rotation(engine(reference, delta))
        assert found is not None  # the sides are those of the measured weights
        return found

    # No name here keeps an update: the engine works on nothing but the one that it measures.
    rounded = turned(weight.to(torch.bfloat16).double().sub_(weight))
    random = [turned(_random_update(reference, change.delta_frobenius, seed, draw)) for draw in range(draws)]
    return Nulls(own, rounded, torch.stack(random))


def _random_update(reference: Reference, norms: Tensor, seed: int, draw: int) -> Tensor:
    """(L, m, n) float64: Gaussian updates with Frobenius norms (L,)."""
    m, n = reference.shape
    # Drawn on the host, so that a device draws the same.
    noise = torch.empty(len(reference.names), m, n, dtype=torch.float64)
    for one, name in zip(noise, reference.names):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{draw}".encode()))
        one.copy_(torch.randn(m, n, generator=generator, dtype=torch.float32))
    scale = norms / torch.linalg.vector_norm(noise, dim=(-2, -1))
    return noise.mul_(scale[:, None, None]).to(reference.device)
