"""Null baselines against measurements of the same nulls made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlspec import SpectralBasis, SpectralTracker

NAMES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]


def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(32, 48, generator=generator) for name in NAMES}


def angles(row: dict) -> float:  # type: ignore[type-arg]
    return 0.5 * (row["angle_left_mean_rad"] + row["angle_right_mean_rad"])


@pytest.mark.parametrize("engine", ["delta", "exact"])
def test_rounding_null_is_the_rotation_by_the_rounding_error(engine: str) -> None:
    reference = base()
    tracker = SpectralTracker(SpectralBasis.from_tensors(reference, modules="q"), engine=engine)  # type: ignore[arg-type]
    row = tracker.measure(reference, step=0, null_draws=1).rows[0]
    # W = W_ref here, so the rounding error alone takes W_ref to its bfloat16 rounding.
    rounded = {name: W.to(torch.bfloat16).float() for name, W in reference.items()}
    assert row["null_rounding_rad"] == pytest.approx(
        angles(tracker.measure(rounded, step=0).rows[0]), rel=1e-3
    )
    assert row["null_rounding_rad"] > 1e-4
    assert row["null_random_rad"] == 0.0  # an update of norm 0 turns nothing


def test_bfloat16_weights_have_no_rounding_null() -> None:
    reference = {name: W.to(torch.bfloat16) for name, W in base().items()}
    tracker = SpectralTracker(SpectralBasis.from_tensors(reference, modules="q"))
    assert all(
        row["null_rounding_rad"] == 0.0 for row in tracker.measure(reference, step=0, null_draws=1).rows
    )


def test_a_random_update_is_typical_and_a_scaling_is_not() -> None:
    reference = base()
    tracker = SpectralTracker(SpectralBasis.from_tensors(reference, modules="q"))
    generator = torch.Generator().manual_seed(5)
    percentiles, ratios = [], []
    for _ in range(15):
        noise = {name: 0.005 * torch.randn(W.shape, generator=generator) for name, W in reference.items()}
        for row in tracker.measure({n: reference[n] + noise[n] for n in NAMES}, step=0, null_draws=60).rows:
            percentiles.append(row["null_random_percentile"])
            ratios.append(angles(row) / row["null_random_rad"])
    # A random update is one more draw from the null: its mean percentile is 50, the mean ratio 1.
    assert 35 < sum(percentiles) / len(percentiles) < 65
    assert min(percentiles) < 20 < 80 < max(percentiles)
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.1)
    # The broken twin of "rotation": a pure scaling moves the weights as far and turns nothing.
    for row in tracker.measure({n: 1.05 * reference[n] for n in NAMES}, step=0, null_draws=9).rows:
        assert row["null_random_percentile"] == 0.0
        assert angles(row) < 1e-3 * row["null_random_rad"]


def test_draws_depend_on_the_matrix_and_change_nothing_else() -> None:
    reference = base()
    tuned = {name: W + 0.01 * W.flip(0) for name, W in reference.items()}
    alone = SpectralTracker(SpectralBasis.from_tensors({NAMES[1]: reference[NAMES[1]]}, modules="q"))
    both = SpectralTracker(SpectralBasis.from_tensors(reference, modules="q"))
    with_nulls = both.measure(tuned, step=0, null_draws=2).rows[1]
    assert with_nulls["null_random_rad"] == pytest.approx(
        alone.measure(tuned, step=0, null_draws=2).rows[0]["null_random_rad"], rel=1e-3
    )
    without = both.measure(tuned, step=0).rows[1]
    nulls = {key for key in without if key.startswith("null_")}
    assert all(without[key] is None for key in nulls)
    assert {k: v for k, v in with_nulls.items() if k not in nulls} == {
        k: v for k, v in without.items() if k not in nulls
    }


@pytest.mark.parametrize("size", [1e-9, 1e-8])
def test_random_updates_have_the_measured_norm_however_small(size: float) -> None:
    """Float32 weights cannot hold such a draw; what it turns grows with its size all the same."""
    reference = base()
    generator = torch.Generator().manual_seed(1)
    found = []
    for scale in (size, 1e-4):
        tuned = {
            n: w.double() + scale * torch.randn(w.shape, generator=generator) for n, w in reference.items()
        }
        row = SpectralTracker(SpectralBasis.from_tensors(reference, modules="q")).measure(
            tuned, step=0, null_draws=6
        )
        found.append(row.rows[0]["null_random_rad"] / scale)
    assert found[0] == pytest.approx(found[1], rel=0.3)
