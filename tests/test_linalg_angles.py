"""Principal angles against planted ones, where arccos of a cosine cannot see them."""

from __future__ import annotations

import math

import pytest
import torch

from rlspec.errors import TensorError
from rlspec.linalg.angles import principal_angles, principal_sines


def planted(angles: list[float], n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 bases (n, k) whose principal angles are exactly ``angles``, each in a random rotation."""
    k = len(angles)
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    theta = torch.tensor(angles, dtype=torch.float64)
    a = frame[:, :k]
    b = a * theta.cos() + frame[:, k : 2 * k] * theta.sin()
    turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=generator))[0]
    return a @ turn.mT, b @ turn


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 0.5, math.pi / 4, 1.2, math.pi / 2 - 1e-6])
def test_planted_angles_are_found(size: float) -> None:
    wanted = [size, size / 2, size / 3, size / 7]
    a, b = planted(wanted, 64)
    got = principal_angles(a, b)
    # float64 rounding of the bases is worth a few 1e-16 rad, whatever the angle.
    assert (got - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 3e-15
    assert (principal_sines(a, b) - got.sin()).abs().max() < 3e-15


def test_a_cosine_does_not_see_a_microradian() -> None:
    """The broken twin: what the sine form is there to avoid."""
    a, b = planted([1e-6, 1e-6], 32)
    cosines = torch.linalg.svdvals(a.float().mT @ b.float()).clamp(max=1)
    assert (torch.arccos(cosines) - 1e-6).abs().max() > 0.5e-6
    assert (principal_angles(a, b) - 1e-6).abs().max() < 1e-14


def test_small_angles_beside_a_right_angle() -> None:
    wanted = [math.pi / 2, 1.0, 1e-4, 1e-8]
    a, b = planted(wanted, 40)
    assert (principal_angles(a, b) - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 3e-15


def test_the_order_of_the_two_bases_does_not_matter_and_the_smaller_counts() -> None:
    a, b = planted([1.3, 1e-3, 1e-7], 30)
    larger = torch.linalg.qr(torch.cat([a, torch.randn(30, 5, dtype=torch.float64)], -1))[0]
    assert torch.allclose(principal_angles(a, b), principal_angles(b, a), rtol=0, atol=1e-14)
    assert torch.allclose(principal_angles(larger, b), principal_angles(b, larger), rtol=0, atol=1e-14)
    assert principal_angles(larger, a).max() < 1e-14


def test_bases_rounded_to_float32_show_only_their_rounding() -> None:
    a, b = planted([1e-3, 5e-4], 48)
    got = principal_angles(a.float(), b.float())
    assert (got - torch.tensor([1e-3, 5e-4], dtype=torch.float64)).abs().max() < 3e-7
    assert principal_angles(a.bfloat16(), a.bfloat16()).max() < 1e-14


def test_batches_agree_with_loops() -> None:
    pairs = [planted([0.3, 1e-5 * (i + 1)], 20, seed=i) for i in range(6)]
    a = torch.stack([p[0] for p in pairs]).reshape(2, 3, 20, 2)
    b = torch.stack([p[1] for p in pairs]).reshape(2, 3, 20, 2)
    batch = principal_angles(a, b)
    assert batch.shape == (2, 3, 2)
    for i, pair in enumerate(pairs):
        assert torch.allclose(batch[i // 3, i % 3], principal_angles(*pair), rtol=0, atol=1e-14)


def test_edges() -> None:
    whole = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert principal_angles(whole, whole[:, [4, 0, 1, 3, 2]]).max() < 1e-14
    assert principal_angles(torch.zeros(5, 0), torch.zeros(5, 0)).shape == (0,)
    assert principal_angles(torch.zeros(0, 5, 2), torch.zeros(0, 5, 2)).shape == (0, 2)
    line = torch.ones(1, 1)
    assert principal_angles(line, -line).item() == 0.0


def test_refusals() -> None:
    a, b = planted([0.1, 0.2], 10)
    with pytest.raises(TensorError, match="shapes"):
        principal_angles(a, b[:9])
    with pytest.raises(TensorError, match="orthonormal"):
        principal_angles(a, 2 * b)
    with pytest.raises(TensorError, match="orthonormal"):
        principal_angles(a, b * float("nan"))
    with pytest.raises(TensorError, match="3 columns"):
        principal_angles(torch.eye(2, 3), torch.eye(2, 3))
