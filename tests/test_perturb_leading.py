"""Updates that lift trailing directions past the leading ones without coupling them: found, and told rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlspec.perturb import leading
from rlspec.perturb.norms import estimated_norm
from rlspec.restore.matrix import restore_matrix
from rlspec.spectra import SpectralBasis, SpectralTracker

NAME = "model.layers.0.self_attn.q_proj.weight"
SHARE = 0.2


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def values_tuned(m: int, n: int, spread: float) -> tuple[Tensor, Tensor]:
    """A weight, and the same with other singular values, each changed by itself."""
    r = min(m, n)
    u, v, s = orthonormal(m, r, 0), orthonormal(n, r, 1), torch.linspace(1, 0.3, r, dtype=torch.float64)
    factors = 1 + spread * torch.randn(r, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (u * s) @ v.mT, (u * (s * factors)) @ v.mT


def intruder(m: int, n: int) -> tuple[Tensor, Tensor]:
    """A weight, and the same with a new direction, of the longest value, in place of one of its last."""
    r = min(m, n)
    u, v, s = orthonormal(m, r, 0), orthonormal(n, r, 1), torch.linspace(1, 0.3, r, dtype=torch.float64)
    return (u * s) @ v.mT, (u * s) @ v.mT + 1.2 * torch.outer(u[:, -2], v[:, -2])


def row(base: Tensor, tuned: Tensor, engine: Any) -> dict[str, Any]:
    basis = SpectralBasis.from_tensors({NAME: base}, modules="q", rank=SHARE)
    (found,) = SpectralTracker(basis, engine=engine).measure({NAME: tuned}, step=1).rows
    return found


CASES = {
    "values, 64 x 64": (*values_tuned(64, 64, 0.3), torch.float64),
    "values, 256 x 512": (*values_tuned(256, 512, 0.1), torch.float32),
    "values, 520 x 400": (*values_tuned(520, 400, 0.1), torch.float32),
    "an intruder, 128 x 96": (*intruder(128, 96), torch.float64),
    "an intruder, 400 x 520": (*intruder(400, 520), torch.float32),
}


def disagreement(base: Tensor, tuned: Tensor) -> bool:
    """Whether the engines differ by more than the bounds that they state."""
    found, wanted = (row(base, tuned, engine) for engine in ("delta", "exact"))
    angle = found["angle_error_bound_rad"] + wanted["angle_error_bound_rad"]
    sigma = found["sigma_error_bound"] + wanted["sigma_error_bound"]
    largest = float(torch.linalg.matrix_norm(tuned.double(), 2))
    return (
        any(
            abs(found[f"angle_{side}_{kind}_rad"] - wanted[f"angle_{side}_{kind}_rad"]) > angle
            for side in ("left", "right")
            for kind in ("max", "mean")
        )
        or abs(found["sigma_change_rel_max"] - wanted["sigma_change_rel_max"]) * largest > sigma
    )


@pytest.mark.parametrize("case", CASES)
def test_what_overtakes_is_seen(case: str) -> None:
    base, tuned, dtype = CASES[case]
    base, tuned = base.to(dtype), tuned.to(dtype)
    assert not disagreement(base, tuned)
    result = restore_matrix(base, tuned, SHARE, dtype=torch.float64)
    (u, _, vh), (u_t, s, vh_t) = (torch.linalg.svd(x.double(), full_matrices=False) for x in (base, tuned))
    k = result.k
    change = (u[:, :k] * s[:k]) @ vh[:k] - (u_t[:, :k] * s[:k]) @ vh_t[:k]
    error = torch.linalg.norm(result.weight - tuned.double() - change)
    assert error <= max(result.error_estimate, 1e-5 * float(change.norm()))


def test_without_the_look_outside_they_are_told_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin."""
    monkeypatch.setattr(
        leading,
        "norm_outside",
        lambda reference, delta, pair: torch.zeros(len(reference.names), dtype=torch.float64),
    )
    wrong = [
        case for case, (base, tuned, dtype) in CASES.items() if disagreement(base.to(dtype), tuned.to(dtype))
    ]
    assert set(wrong) >= {"values, 256 x 512", "values, 520 x 400"}


def test_an_ordinary_update_costs_no_look_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(*_: Any) -> Tensor:
        raise AssertionError("looked")

    monkeypatch.setattr(leading, "norm_outside", looked)
    base, _ = values_tuned(256, 200, 0.0)
    noise = torch.randn(256, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tuned = base + 0.005 * noise * base.norm() / noise.norm()
    assert row(base.float(), tuned.float(), "delta")["engine"] == "delta"
    assert restore_matrix(base.float(), tuned.float(), SHARE).method == "delta"


@pytest.mark.parametrize(("kept", "share"), [(0.1, 0.5), (0.125, 0.5), (0.1, 0.3)])
def test_a_tuned_matrix_of_low_rank_is_measured_and_restored(kept: float, share: float) -> None:
    """Its bases depend on each other: no core can be had of them, which is no failure of the event."""
    r = 256
    u, v = orthonormal(r, r, 0), orthonormal(r, r, 1)
    s = 1.0 / torch.arange(1, r + 1, dtype=torch.float64)
    k = int(kept * r)
    base, tuned = ((u * s) @ v.mT).float(), ((u[:, :k] * s[:k]) @ v[:, :k].mT).float()
    basis = SpectralBasis.from_tensors({NAME: base}, modules="q", rank=share)
    (found,) = SpectralTracker(basis).measure({NAME: tuned}, step=1).rows
    (wanted,) = SpectralTracker(basis, engine="exact").measure({NAME: tuned}, step=1).rows
    assert found["sigma_change_rel_max"] == pytest.approx(wanted["sigma_change_rel_max"], rel=1e-5)
    assert restore_matrix(base, tuned, share).weight.isfinite().all()


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e18])
def test_the_norm_of_an_update_of_any_size_is_known(size: float) -> None:
    from rlspec.perturb.delta import DenseDelta

    base = torch.zeros(1, 48, 40, dtype=torch.float64)
    update = torch.randn(1, 48, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size
    delta = DenseDelta.between(base + update, base).to(torch.float32)
    wanted = torch.linalg.matrix_norm(update, 2)
    assert torch.allclose(estimated_norm(delta).double(), wanted, rtol=2e-2, atol=0)
