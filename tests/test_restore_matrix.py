"""Restoration against the dense float64 formula, and what its report says."""

from __future__ import annotations

import pytest
import torch
from spectra_toys import F64, flat_at_the_cut, random_update

import rlspec
from rlspec import restore_matrix
from rlspec.errors import OptionError, TensorError
from rlspec.linalg.rank import Rank
from rlspec.perturb.matrix import matrix_basis
from rlspec.restore import matrix
from rlspec.restore.matrix import same_entries
from rlspec.spectra import SpectralBasis


def pair(m: int, n: int, eps: float, *, seed: int = 0, dtype: torch.dtype = F64):
    """A base whose spectrum is flat at the cut, and the base plus a random update of relative size eps."""
    g = torch.Generator().manual_seed(seed)
    base = flat_at_the_cut(m, n, g).to(dtype)
    tuned = (base.double() + random_update(base.double(), eps, None, g)).to(dtype)
    return base, tuned


def formula(base, tuned, start, stop, *, values="tuned"):
    ub, sb, vb = torch.linalg.svd(base.double(), full_matrices=False)
    ut, st, vt = torch.linalg.svd(tuned.double(), full_matrices=False)
    i = slice(start, stop)
    s = sb[i] if values == "base" else st[i]
    return tuned.double() - (ut[:, i] * st[i]) @ vt[i] + (ub[:, i] * s) @ vb[i]


@pytest.mark.parametrize(("eps", "target"), [(1e-3, 0.01), (1e-2, 0.01), (5e-2, 0.03), (0.2, 0.1)])
@pytest.mark.parametrize("shape", [(96, 96), (48, 128), (128, 48)])
def test_error_is_a_small_share_of_the_intended_change(shape, eps, target):
    base, tuned = pair(*shape, eps)
    found = rlspec.restore_matrix(base, tuned, 0.2)
    truth = formula(base, tuned, 0, found.k)
    error = (found.weight - truth).norm()
    intended = (truth - tuned).norm()
    assert float(error / intended) <= target
    assert float(error) <= found.error_estimate + 1e-12
    assert found.method == ("exact" if eps > 0.1 else "delta")
    assert found.change_frobenius == pytest.approx(float(intended), rel=target)


@pytest.mark.parametrize("shape", [(40, 40), (24, 60)])
def test_all_directions_keep_the_tuned_values(shape):
    base, tuned = pair(*shape, 1e-2)
    found = rlspec.restore_matrix(base, tuned, 1.0)
    u, _, vh = torch.linalg.svd(base, full_matrices=False)
    expected = (u * torch.linalg.svdvals(tuned)) @ vh
    torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found.weight, base, atol=1e-6)


def test_modes_against_the_formula():
    base, tuned = pair(40, 50, 1e-2)
    restore = rlspec.restore_matrix
    cases = {
        "tail": (restore(base, tuned, 8, mode="tail"), formula(base, tuned, 32, 40)),
        "band": (restore(base, tuned, 8, mode="band", band=(5, 17)), formula(base, tuned, 5, 17)),
        "values and directions": (
            restore(base, tuned, 8, mode="directions_and_values"),
            formula(base, tuned, 0, 8, values="base"),
        ),
        "copy": (restore(base, tuned, 8, mode="copy"), base),
        "interpolate": (
            restore(base, tuned, 8, mode="interpolate", strength=0.25),
            tuned + 0.25 * (base - tuned),
        ),
    }
    for name, (found, expected) in cases.items():
        torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-5 * 0.1, msg=name)
    values = restore(base, tuned, 40, mode="values").weight
    torch.testing.assert_close(torch.linalg.svdvals(values), torch.linalg.svdvals(base), rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_strength_zero_is_the_tuned_weight_bit_for_bit(dtype):
    base, tuned = pair(30, 30, 1e-2, dtype=dtype)
    for rounding in ("nearest", "stochastic"):
        found = rlspec.restore_matrix(base, tuned, 6, strength=0.0, rounding=rounding)
        assert torch.equal(found.weight, tuned)
        assert (found.change_frobenius, found.rounding_share, found.entries_changed) == (0.0, 0.0, 0)


def test_entries_that_move_by_less_than_half_a_unit_stay():
    base, tuned = pair(60, 60, 3e-3, dtype=torch.bfloat16)
    found = rlspec.restore_matrix(base, tuned, 0.2)
    exact = rlspec.restore_matrix(base, tuned, 0.2, dtype=F64).weight
    up = (torch.nextafter(tuned, torch.full_like(tuned, torch.inf)) - tuned).double()
    down = (tuned - torch.nextafter(tuned, torch.full_like(tuned, -torch.inf))).double()
    small = (exact - tuned.double()).abs() < 0.499 * torch.minimum(up, down)
    assert bool(small.any()) and bool((~small).any())
    assert torch.equal(found.weight[small], tuned[small])
    assert (
        found.rounding_share > 0.1
    )  # bfloat16 eats a large part of so small a change, and the report says so
    lost = (found.weight.double() - exact).norm() / (exact - tuned.double()).norm()
    assert found.rounding_share == pytest.approx(float(lost), rel=1e-6)


def test_stochastic_rounding_is_unbiased_and_seeded():
    base, tuned = pair(40, 40, 3e-3, dtype=torch.bfloat16)
    exact = rlspec.restore_matrix(base, tuned, 0.2, dtype=F64).weight

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return rlspec.restore_matrix(base, tuned, 0.2, rounding="stochastic", generator=g).weight.double()

    assert torch.equal(draw(1), draw(1))
    mean = torch.stack([draw(seed) for seed in range(40)]).mean(0)
    nearest = rlspec.restore_matrix(base, tuned, 0.2).weight.double()
    assert (mean - exact).norm() < 0.5 * (nearest - exact).norm()


def test_options_and_tensors_are_checked():
    base, tuned = pair(10, 12, 1e-2)
    restore = rlspec.restore_matrix
    for options in (
        {"mode": "x"},
        {"rounding": "x"},
        {"strength": 1.5},
        {"mode": "band"},
        {"mode": "tail", "band": (0, 3)},
    ):
        with pytest.raises(OptionError):
            restore(base, tuned, 2, **options)
    with pytest.raises(OptionError, match=r"band \(3, 99\)"):
        restore(base, tuned, 2, mode="band", band=(3, 99))
    with pytest.raises(TensorError, match="one shape"):
        restore(base, tuned.T, 2)
    tuned[0, 0] = torch.nan
    with pytest.raises(TensorError, match="W_tuned"):
        restore(base, tuned, 2)


def test_equal_matrices_restore_to_themselves():
    base, _ = pair(20, 20, 1e-2)
    found = rlspec.restore_matrix(base, base.clone(), 4)
    torch.testing.assert_close(found.weight, base, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (90, 40)])
@pytest.mark.parametrize("mode", ["directions", "directions_and_values", "values", "band"])
def test_the_delta_form_agrees_with_the_formula_and_with_exact(shape, mode):
    base, tuned = pair(*shape, 1e-2)
    options = {"mode": mode, "band": (3, 14)} if mode == "band" else {"mode": mode}
    found = rlspec.restore_matrix(base, tuned, 12, **options)
    exact = rlspec.restore_matrix(base, tuned, 12, exact=True, **options)
    start, stop = (3, 14) if mode == "band" else (0, 12)
    if mode == "values":
        sb = torch.linalg.svdvals(base)
        ut, st, vt = torch.linalg.svd(tuned, full_matrices=False)
        truth = tuned + (ut[:, :12] * (sb[:12] - st[:12])) @ vt[:12]
    else:
        truth = formula(base, tuned, start, stop, values="base" if mode.endswith("values") else "tuned")
    assert (found.method, exact.method) == ("delta", "exact")
    size = float((truth - tuned).norm())
    assert float((exact.weight - truth).norm()) <= 1e-12 * float(base.norm())
    assert float((found.weight - truth).norm()) <= min(0.01 * size, found.error_estimate)
    assert found.rotation_sine_rms == pytest.approx(exact.rotation_sine_rms, rel=0.01)


def test_the_rotation_undone_is_that_of_the_principal_angles():
    base, tuned = pair(50, 50, 2e-2)
    found = rlspec.restore_matrix(base, tuned, 10)
    sines = []
    for axis in (0, 2):
        x, y = (torch.linalg.svd(w, full_matrices=False)[axis] for w in (base, tuned))
        x, y = (x[:, :10], y[:, :10]) if axis == 0 else (x[:10].T, y[:10].T)
        sines.append(float((y - x @ (x.T @ y)).norm()) / 10**0.5)
    assert found.rotation_sine_rms == pytest.approx(max(sines), rel=0.01)
    assert rlspec.restore_matrix(base, tuned, 10, mode="copy").rotation_sine_rms is None


@pytest.mark.parametrize("part", [(0, 6), (5, 14), (30, 40)])
def test_values_and_both_take_a_range_of_indices(part):
    base, tuned = pair(40, 50, 1e-2)
    start, stop = part
    both = rlspec.restore_matrix(base, tuned, 8, mode="directions_and_values", band=part)
    truth = formula(base, tuned, start, stop, values="base")
    assert float((both.weight - truth).norm()) <= 0.01 * float((truth - tuned).norm())
    values = rlspec.restore_matrix(base, tuned, 8, mode="values", band=part)
    u, s, vh = torch.linalg.svd(tuned, full_matrices=False)
    s[start:stop] = torch.linalg.svdvals(base)[start:stop]
    assert float((values.weight - (u * s) @ vh).norm()) <= 0.01 * float(((u * s) @ vh - tuned).norm())


def test_a_zero_matrix_can_be_copied_over():
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    found = rlspec.restore_matrix(base, torch.zeros(6, 8), 2, mode="copy")
    assert torch.equal(found.weight, base) and found.change_relative == 0.0


@pytest.mark.parametrize("rank", [0, 5])
def test_directions_that_the_base_does_not_have_are_left_alone(rank: int) -> None:
    """What LAPACK returns for zero singular values hangs on the order of the columns; the result must not."""
    g = torch.Generator().manual_seed(rank)
    base = torch.randn(40, rank, generator=g) @ torch.randn(rank, 32, generator=g)
    tuned = base + 0.1 * torch.randn(40, 32, generator=g)
    order = torch.randperm(32, generator=g)
    found = restore_matrix(base, tuned, 10, dtype=torch.float64)
    again = restore_matrix(base[:, order], tuned[:, order], 10, dtype=torch.float64)
    torch.testing.assert_close(again.weight, found.weight[:, order], rtol=0, atol=1e-5)
    assert found.k == rank and found.note is not None and f"numerical rank {rank}" in found.note
    assert rank > 0 or torch.equal(found.weight, tuned.double())
    tail = restore_matrix(base, tuned, 4, mode="tail")
    assert tail.k == 0 and torch.equal(tail.weight, tuned)
    values = restore_matrix(base, tuned, 10, mode="values")  # zeros are as good as any values
    assert values.k == 10 and values.note is None


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_estimates_hold_where_the_base_is_small_beside_the_tuned_matrix(scale: float) -> None:
    g = torch.Generator().manual_seed(2)
    base, tuned = scale * torch.randn(400, 400, generator=g), torch.randn(400, 400, generator=g)
    found = restore_matrix(base, tuned, 0.2, dtype=torch.float64)
    (u, _, v), (x, s, y) = (torch.linalg.svd(a.double(), full_matrices=False) for a in (base, tuned))
    k = found.k
    expected = tuned.double() + (u[:, :k] * s[:k]) @ v[:k] - (x[:, :k] * s[:k]) @ y[:k]
    error = float((found.weight - expected).norm())
    assert error <= found.error_estimate < 1e-3 * found.change_frobenius


def test_only_floating_matrices_and_no_graph() -> None:
    w = torch.randn(8, 6)
    for bad in (w.int(), w.to(torch.complex64)):
        with pytest.raises(TensorError, match="floating dtype"):
            restore_matrix(bad, bad, 2)
    with pytest.raises(OptionError, match="int8 is not a floating"):
        restore_matrix(w, w + 1, 2, dtype=torch.int8)
    base, tuned = torch.nn.Parameter(w), torch.nn.Parameter(w + 0.1 * torch.randn(8, 6))
    assert not restore_matrix(base, tuned, 2).weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_copy_is_the_base_itself(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    base, tuned = (
        torch.randn(50, 50, generator=g).to(dtype),
        1000 * torch.randn(50, 50, generator=g).to(dtype),
    )
    base[0, 0] = -0.0
    found = restore_matrix(base, tuned, 5, mode="copy").weight
    assert torch.equal(found, base) and bool(found[0, 0].signbit())


def test_the_basis_of_another_matrix_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    base, other, tuned = (torch.randn(12, 9, generator=generator) for _ in range(3))
    bases = SpectralBasis.from_tensors(
        {"model.layers.0.self_attn.q_proj.weight": base, "model.layers.1.self_attn.q_proj.weight": other},
        modules="q",
        rank=3,
    )
    own, wrong = (bases.matrix(f"model.layers.{i}.self_attn.q_proj.weight") for i in range(2))
    found = restore_matrix(base, tuned, 3, basis=own)
    assert torch.allclose(found.weight, restore_matrix(base, tuned, 3).weight, atol=1e-6)
    with pytest.raises(TensorError, match="other entries than W_base"):
        restore_matrix(base, tuned, 3, basis=wrong)
    with pytest.raises(TensorError, match=r"shape \(12, 9\), W_base has \(9, 12\)"):
        restore_matrix(base.T, tuned.T, 3, basis=own)


def test_a_matrix_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor copied in float64 for it, which of a large one takes gigabytes; an equal one elsewhere is compared."""
    compared = []

    def counted(first: torch.Tensor, second: torch.Tensor) -> bool:
        compared.append((first, second))
        return same_entries(first, second)

    monkeypatch.setattr(matrix, "same_entries", counted)
    base, tuned = pair(16, 12, 1e-2, dtype=torch.float32)
    own = matrix_basis("base", base, torch.linalg.svd(base, full_matrices=False), Rank.parse(3))
    found = [restore_matrix(given, tuned, 3, basis=own).weight for given in (own.W, own.W.clone())]
    assert len(compared) == 1 and torch.equal(*found)
