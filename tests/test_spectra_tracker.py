"""The tracker against planted rotations, planted singular-value changes and awkward matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from restore_toys import save_model

from rlspec.errors import OptionError, TensorError
from rlspec.spectra import SpectralBasis, SpectralTracker
from rlspec.spectra.table import COLUMNS

F64 = torch.float64
NAME = "model.layers.{}.self_attn.{}_proj.weight"
Q0 = NAME.format(0, "q")


def orthonormal(n: int, r: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, r, dtype=F64, generator=generator)).Q


def rotate(basis: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn column i towards column r-1-i by angles[i]: those are then the principal angles of the leading
    columns."""
    turned = basis.clone()
    for i, angle in enumerate(angles.tolist()):
        j = basis.shape[1] - 1 - i
        turned[:, i] = math.cos(angle) * basis[:, i] + math.sin(angle) * basis[:, j]
        turned[:, j] = math.cos(angle) * basis[:, j] - math.sin(angle) * basis[:, i]
    return turned


def planted(m: int, n: int, k: int, *, largest: float, seed: int = 0):
    """(W_ref, W, left angles, right angles, s_ref, s) with known rotations of both sides; angles
    descending."""
    g = torch.Generator().manual_seed(seed)
    r = min(m, n)
    u, v = orthonormal(m, r, g), orthonormal(n, r, g)
    s_ref = torch.linspace(3.0, 1.0, r, dtype=F64)
    s_ref[:k] += 1.0  # a gap at the cut, so that the planted subspaces are the leading ones
    s = s_ref * (1.0 + 1e-3 * torch.linspace(-1.0, 1.0, r, dtype=F64))
    left = largest * torch.logspace(0, -1, k, dtype=F64)
    right = 0.5 * left
    weight = (rotate(u, left) * s) @ rotate(v, right).T
    return (u * s_ref) @ v.T, weight, left, right, s_ref, s


def tensors(
    q: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    return {NAME.format(0, p): t for p, t in {"q": q, "k": k, "v": v}.items() if t is not None}


@pytest.mark.parametrize("largest", [1e-6, 1e-4, 1e-2, 1e-1])
@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
def test_planted_rotation_and_values(shape, largest):
    k = 8
    ref, weight, left, right, _, s = planted(*shape, k, largest=largest)
    basis = SpectralBasis.from_tensors(tensors(ref), modules="q", rank=k)
    record = SpectralTracker(basis, engine="exact").measure(tensors(weight), step=7, stage="sft")
    (row,) = record.rows
    found_left = record.arrays[f"{Q0}/sines_left"].asin()
    found_right = record.arrays[f"{Q0}/sines_right"].asin()
    # float64 rounding of the planted product is about 1e-14 over a gap of 1
    torch.testing.assert_close(found_left, left, rtol=0, atol=2e-13)
    torch.testing.assert_close(found_right, right, rtol=0, atol=2e-13)
    torch.testing.assert_close(record.arrays[f"{Q0}/sigma"], s[:k], rtol=1e-13, atol=0)
    assert row["angle_left_max_rad"] == pytest.approx(largest, rel=1e-6)
    assert row["sigma_change_rel_max"] == pytest.approx(1e-3, rel=1e-8)
    assert (row["stage"], row["step"], row["module"], row["layer"], row["rank"]) == ("sft", 7, "q", 0, k)
    assert row["delta_frobenius"] == pytest.approx(float((weight - ref).norm()), rel=1e-12)
    assert abs(found_left[0].item() - left[0].item()) <= row["angle_error_bound_rad"]


@pytest.mark.parametrize("engine", ["delta", "exact"])
@pytest.mark.parametrize("largest", [1e-4, 1e-2, 1e-1])
@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
def test_best_matches_of_a_planted_rotation(shape, largest, engine):
    """Each leading vector turns towards one past the cut, so that its best match among the leading ones is itself."""
    ref, weight, left, right, _, _ = planted(*shape, 8, largest=largest)
    basis = SpectralBasis.from_tensors(tensors(ref), modules="q", rank=8)
    (row,) = SpectralTracker(basis, engine=engine).measure(tensors(weight), step=1).rows
    # The delta engine stops where angles are known to some thousandths: 1 - cos of the largest to a hundredth.
    near = 1e-13 if engine == "exact" else 1e-13 + 0.01 * (1 - math.cos(largest))
    assert row["engine"] == engine
    for side, angles in (("left", left), ("right", right)):
        assert row[f"best_match_{side}_min"] == pytest.approx(float(angles.cos().min()), rel=0, abs=near)
        assert row[f"best_match_{side}_mean"] == pytest.approx(float(angles.cos().mean()), rel=0, abs=near)


@pytest.mark.parametrize("engine", ["delta", "exact"])
def test_best_matches_know_no_order_and_tell_a_rotation_within_the_subspace(engine):
    g = torch.Generator().manual_seed(5)
    u, v = orthonormal(30, 6, g), orthonormal(20, 6, g)
    s = torch.tensor([4.01, 4.0, 3.0, 2.0, 1.0, 0.5], dtype=F64)
    basis = SpectralBasis.from_tensors(tensors((u * s) @ v.T), modules="q", rank=4)

    def row(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
        return SpectralTracker(basis, engine=engine).measure(tensors((u * s) @ v.T), step=1).rows[0]

    swapped = row(u, s[[1, 0, 2, 3, 4, 5]] + torch.tensor([0, 0.02, 0, 0, 0, 0]), v)
    turn = torch.eye(6, dtype=F64)
    turn[:2, :2] = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=F64) * 0.5**0.5
    turned = row(u @ turn, s, v @ turn)
    for side in ("left", "right"):
        assert swapped[f"best_match_{side}_min"] == pytest.approx(1.0, abs=1e-12)
        assert turned[f"best_match_{side}_min"] == pytest.approx(0.5**0.5, abs=1e-6)
        assert turned[f"best_match_{side}_mean"] == pytest.approx((2 + 2 * 0.5**0.5) / 4, abs=1e-6)
        assert turned[f"angle_{side}_max_rad"] < 1e-9
    assert turned["block_vectors"] == 2


def test_rows_hold_every_column_and_are_json():
    ref, weight, *_ = planted(30, 30, 6, largest=0.01)
    basis = SpectralBasis.from_tensors(tensors(ref), modules="q", rank=0.2)
    record = SpectralTracker(basis).measure(tensors(weight), step=1)
    assert set(record.rows[0]) == set(COLUMNS)
    json.dumps(record.rows, allow_nan=False)


def test_rows_say_which_arithmetic_made_them():
    weight, tuned, *_ = planted(40, 40, 8, largest=1e-2)
    for dtype, far, engine, arithmetic in (
        (torch.float32, 0.0, "delta", "float32"),
        (torch.bfloat16, 0.0, "delta", "float32"),
        (F64, 0.0, "delta", "float64"),
        (torch.float32, 1.0, "exact", "float64"),  # no small update: a full decomposition
    ):
        basis = SpectralBasis.from_tensors(tensors(weight.to(dtype)), modules="q")
        moved = tuned + far * torch.randn(40, 40, dtype=F64, generator=torch.Generator().manual_seed(0))
        (row,) = SpectralTracker(basis).measure(tensors(moved.to(dtype)), step=1).rows
        assert (row["engine"], row["arithmetic"]) == (engine, arithmetic)


def test_unchanged_weights_measure_exact_zeros():
    g = torch.Generator().manual_seed(3)
    ref = torch.randn(48, 32, generator=g)
    basis = SpectralBasis.from_tensors(tensors(ref), modules="q", rank=0.25)
    (row,) = SpectralTracker(basis).measure(tensors(ref), step=0).rows
    zero = ["nss_k", "delta_frobenius", "delta_relative", "delta_stable_rank", "rho_k", "energy_diagonal"]
    zero += ["energy_offdiagonal", "sigma_change_rel_max", "angle_left_max_rad", "angle_right_rms_rad"]
    zero += ["projector_distance_left", "projector_distance_right", "intruder_dimensions"]
    assert {name: row[name] for name in zero} == dict.fromkeys(zero, 0)
    assert row["update_sparsity"] == 1.0
    assert row["best_match_left_min"] == row["best_match_right_mean"] == 1.0


def test_whole_dimension_side_is_skipped_with_a_note():
    g = torch.Generator().manual_seed(4)
    ref = torch.randn(16, 40, generator=g)
    basis = SpectralBasis.from_tensors(tensors(ref), modules="q", rank=16)
    record = SpectralTracker(basis).measure(tensors(ref + 0.01), step=1)
    (row,) = record.rows
    assert row["angle_left_max_rad"] is None and row["projector_distance_left"] is None
    assert 0 < row["best_match_left_min"] < 1  # vectors turn within it
    assert row["angle_right_max_rad"] > 0
    assert "left angles skipped" in row["note"]
    assert f"{Q0}/sines_left" not in record.arrays
    assert row["gap_at_cut_rel"] is None


def test_grouped_heads_use_a_share_of_their_own_rank():
    g = torch.Generator().manual_seed(5)
    ref = tensors(
        torch.randn(40, 40, generator=g), torch.randn(10, 40, generator=g), torch.randn(10, 40, generator=g)
    )
    basis = SpectralBasis.from_tensors(ref, rank=0.2)
    rows = (
        SpectralTracker(basis)
        .measure({k: v + 0.01 * torch.randn_like(v) for k, v in ref.items()}, step=1)
        .rows
    )
    assert {row["module"]: row["rank"] for row in rows} == {"q": 8, "k": 2, "v": 2}


def test_reference_below_the_rank_is_followed_at_its_numerical_rank():
    g = torch.Generator().manual_seed(6)
    ref = torch.randn(20, 3, dtype=F64, generator=g) @ torch.randn(3, 30, dtype=F64, generator=g)
    basis = SpectralBasis.from_tensors(tensors(ref), modules="q", rank=8)
    (row,) = SpectralTracker(basis).measure(tensors(ref + 1e-9), step=1).rows
    assert row["rank"] == 3
    assert "numerical rank 3" in row["note"]
    assert row["angle_left_max_rad"] < 1e-6


def test_zero_reference_is_reported_not_measured():
    basis = SpectralBasis.from_tensors(tensors(torch.zeros(8, 8)), modules="q", rank=2)
    (row,) = SpectralTracker(basis).measure(tensors(torch.ones(8, 8)), step=1).rows
    assert row["angle_left_max_rad"] is None and "not measured" in row["note"]


def test_fused_projection_is_measured_by_its_parts():
    g = torch.Generator().manual_seed(7)
    fused = torch.randn(3 * 24, 24, generator=g)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    changed = fused.clone()
    changed[24:48] += 0.05 * torch.randn(24, 24, generator=g)  # the key rows only
    output = {"model.layers.0.self_attn.o_proj.weight": torch.randn(24, 24, generator=g)}
    basis = SpectralBasis.from_tensors({name: fused, **output}, rank=4)
    rows = SpectralTracker(basis).measure({name: changed, **output}, step=1).rows
    moved = {row["module"]: row["delta_frobenius"] for row in rows}
    assert moved["k"] > 0 and moved["q"] == 0 and moved["v"] == 0


def test_the_reference_does_not_follow_the_model():
    q = torch.nn.Parameter(torch.randn(12, 12))
    basis = SpectralBasis.from_tensors({Q0: q}, modules="q", rank=3)
    with torch.no_grad():
        q.add_(1.0)
    (row,) = SpectralTracker(basis).measure({Q0: q}, step=1).rows
    assert row["delta_frobenius"] == pytest.approx(12.0, rel=1e-5)


def test_mixed_layers_keep_their_order_and_match_single_measurements():
    g = torch.Generator().manual_seed(8)
    ref = {NAME.format(i, p): torch.randn(16, 16, generator=g) for i in range(3) for p in "qkv"}
    now = {name: w + 0.02 * torch.randn(16, 16, generator=g) for name, w in ref.items()}
    basis = SpectralBasis.from_tensors(ref, rank=4)
    together = SpectralTracker(basis).measure(now, step=1)
    assert [row["name"] for row in together.rows] == [p.name for p in basis.projections]
    for name, weight in ref.items():
        module = name.split(".")[4][0]
        alone = SpectralBasis.from_tensors({name: weight}, modules=module, rank=4)
        (row,) = SpectralTracker(alone).measure({name: now[name]}, step=1).rows
        batched = next(r for r in together.rows if r["name"] == name)
        assert row["angle_left_rms_rad"] == pytest.approx(batched["angle_left_rms_rad"], rel=1e-10)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(value):
    ref = torch.randn(8, 8)
    basis = SpectralBasis.from_tensors(tensors(ref), modules="q", rank=2)
    bad = ref.clone()
    bad[3, 4] = value
    with pytest.raises(TensorError, match="layers.0.self_attn.q_proj"):
        SpectralTracker(basis).measure(tensors(bad), step=1)
    with pytest.raises(TensorError, match="layers.0.self_attn.q_proj"):
        SpectralBasis.from_tensors(tensors(bad), modules="q", rank=2)


def test_other_shapes_and_missing_tensors_are_named():
    basis = SpectralBasis.from_tensors(tensors(torch.randn(8, 8)), modules="q", rank=2)
    tracker = SpectralTracker(basis)
    with pytest.raises(TensorError, match="8x8.*8x9"):
        tracker.measure(tensors(torch.randn(8, 9)), step=1)
    with pytest.raises(TensorError, match="q_proj"):
        tracker.measure({"other": torch.randn(8, 8)}, step=1)
    with pytest.raises(OptionError, match="exact"):
        SpectralTracker(basis, engine="nonsense")


def test_tied_models_and_other_prefixes(tmp_path: Path) -> None:
    """A basis of a model measures the checkpoint it saves, which has no head of its own; prefixes may differ."""
    model = save_model(tmp_path / "tied", "tied llama")
    basis = SpectralBasis.from_model(model, modules="all", rank=0.2)
    assert not any("lm_head" in p.name for p in basis.projections)
    saved = SpectralTracker(basis).measure(tmp_path / "tied", step=0)
    assert [row["name"] for row in saved.rows] == [p.name for p in basis.projections]
    inside = {f"language_model.{name}": w for name, w in model.state_dict().items()}
    assert len(SpectralTracker(basis).measure(inside, step=0).rows) == len(saved.rows)


def test_a_record_is_a_table(tmp_path: Path) -> None:
    weights = {Q0: torch.randn(12, 8, generator=torch.Generator().manual_seed(0))}
    record = SpectralTracker(SpectralBasis.from_tensors(weights, modules="q")).measure(weights, step=7)
    frame = record.to_pandas()
    assert list(frame.columns) == list(COLUMNS) and frame["step"].tolist() == [7]
    record.to_csv(tmp_path / "record.csv")
    names, cells = (line.split(",") for line in (tmp_path / "record.csv").read_text().splitlines()[:2])
    assert names == list(COLUMNS) and cells[names.index("name")] == Q0
    assert float(cells[names.index("sigma_max")]) == record.rows[0]["sigma_max"]
