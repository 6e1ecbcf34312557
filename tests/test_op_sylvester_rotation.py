"""sylvester_rotation: on the CPU against the equations that it solves, and the kernel in Triton's interpreter (another
process)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreter_run import run_interpreted

from rlspec.ops.reference import sylvester_rotation_ref
from rlspec.ops.sylvester_rotation import rotation_of_images, sylvester_rotation


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted("sylvester_rotation.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_equations_hold(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    s1, s2 = torch.linspace(3, 2, 5).double().expand(2, 5), torch.linspace(1.5, 0, 7).double().expand(2, 7)
    left, right = torch.randn(2, 2, 7, 5, generator=g).to(dtype)
    p, q = (t.double() for t in sylvester_rotation(s2, s1, left, right, floor=0.02))
    s1, s2 = s1.unsqueeze(-2), s2.unsqueeze(-1)
    close = {"rtol": 0.0, "atol": 100 * torch.finfo(dtype).eps}
    torch.testing.assert_close(s2 * p - q * s1, -left.double(), **close)
    torch.testing.assert_close(s2 * q - p * s1, -right.double(), **close)


def test_close_pairs_are_damped() -> None:
    """A pair of equal values turns no further than the floor says: by (left + right) s / (floor s²)."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    p, q = sylvester_rotation(2 * one[0], 2 * one[0], 3 * one, 5 * one, floor=0.02)
    assert float(p) == float(q) == pytest.approx(16 / 0.08)
    assert [
        float(t) for t in sylvester_rotation_ref(2 * one[0], 2 * one[0], 3 * one, 5 * one, floor=0.02)
    ] == [pytest.approx(200.0)] * 2


def test_couplings_of_images() -> None:
    g = torch.Generator().manual_seed(0)
    u, vh = torch.randn(2, 9, 6, generator=g).double(), torch.randn(2, 6, 8, generator=g).double()
    a, b = torch.randn(2, 9, 4, generator=g).double(), torch.randn(2, 8, 4, generator=g).double()
    values = torch.linspace(3, 1, 6).double().expand(2, 6)
    left, right, p, q = rotation_of_images(u, vh, values, a, b, floor=0.02)
    torch.testing.assert_close(left, torch.einsum("lmr,lmw->lrw", u, a))
    torch.testing.assert_close(right, torch.einsum("lrn,lnw->lrw", vh[:, 4:], b))
    truth = sylvester_rotation_ref(values[:, 4:], values[:, :4], left[:, 4:], right, floor=0.02)
    torch.testing.assert_close((p, q), truth)


def test_no_tail_is_no_rotation() -> None:
    u, vh, values = torch.eye(4)[None], torch.eye(4)[None], torch.ones(1, 4).double()
    left, right, p, q = rotation_of_images(
        u, vh, values, torch.ones(1, 4, 4), torch.ones(1, 4, 4), floor=0.02
    )
    assert left.shape == (1, 4, 4) and right.shape == p.shape == q.shape == (1, 0, 4)
