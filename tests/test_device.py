"""On a device: the same numbers as on the CPU, few waits, few launches. A pretend one where there is no GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from module_toys import named_module
from pretend import Report, pretend_device, to_pretend
from restore_toys import bytes_of, pair
from solver_toys import chosen_jacobi
from torch import Tensor, nn

import rlspec
from rlspec.errors import TensorError
from rlspec.linalg import dense
from rlspec.linalg.orth import orthonormal
from rlspec.linalg.svd import SVDResult
from rlspec.spectra import SpectralBasis, SpectralTracker, room
from rlspec.spectra import tracker as tracker_module
from rlspec.spectra.table import COLUMNS

# Waits of the host and launches of one event over one stack: (shape, matrices, size of the update) -> both. A change that
# moves them says so here. The host waits for the sums, the cores, what decides, and the results; a sweep adds two.
COUNTS = {
    "first order": ((192, 192), 6, 1e-3, 4, 224),
    "one sweep": ((192, 192), 6, 1e-2, 6, 390),
    "wide": ((96, 192), 4, 1e-3, 4, 248),
    "tall": ((192, 96), 4, 1e-3, 4, 247),
}


def weights(
    shape: tuple[int, int], count: int, eps: float, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reference and tuned weights of one shape."""
    g = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for i in range(count):
        u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=g), full_matrices=False)
        s = 3 / (1 + 4 * torch.arange(min(shape)) / min(shape))
        w = (u * s) @ vh
        e = torch.randn(*shape, generator=g)
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        base[name], tuned[name] = w.to(dtype), (w + eps * e * w.norm() / e.norm()).to(dtype)
    return base, tuned


def there(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: to_pretend(t) for name, t in tensors.items()}


def event(
    base: dict[str, Tensor], tuned: dict[str, Tensor], factors: str = "device", **options: object
) -> tuple[tracker_module.SpectralRecord, Report]:
    """One event on the pretend device, after another that may set things up."""
    with pretend_device() as report:
        tracker = SpectralTracker(SpectralBasis.from_tensors(there(base), modules="q"), factors=factors)
        on_device = there(tuned)
        tracker.measure(on_device, step=1)
        report.syncs.clear()
        report.calls.clear()
        return tracker.measure(on_device, step=1, **options), report


@pytest.mark.parametrize("case", COUNTS)
def test_waits_and_launches_of_an_event(case: str):
    shape, count, eps, waits, launches = COUNTS[case]
    record, report = event(*weights(shape, count, eps))
    assert {row["engine"] for row in record.rows} == {"delta"}
    assert len(report.syncs) == waits, report.syncs
    if torch.__version__.startswith("2.13."):  # other releases take other steps inside one call
        assert report.launches == launches
    for operation in ("linalg_qr", "_linalg_eigh", "_linalg_svd"):
        assert report.of(operation) == 0, f"{operation} ran on the device"


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (96, 64)], ids=str)
def test_subspaces_are_compared_where_they_are(shape: tuple[int, int]):
    """Those of small updates there, those of whole decompositions come back; two transfers, the end's apart."""
    base, tuned = weights(shape, 4, 1e-2)
    _, end = weights(shape, 4, 2e-2)
    for name in list(end)[:2]:
        end[name] = (end[name].float() * 3).bfloat16()  # too far to solve for
    for name in list(tuned)[1:3]:
        tuned[name] = base[name]
    here = SpectralTracker(SpectralBasis.from_tensors(base, modules="q"))
    right = here.measure(tuned, step=1, end=here.subspaces(end)).rows
    with pretend_device() as report:
        tracker = SpectralTracker(SpectralBasis.from_tensors(there(base), modules="q"))
        ends = tracker.subspaces(there(end))
        now = there(tuned)
        tracker.measure(now, step=1, end=ends)
        waits = []
        for options in ({}, {"end": ends}):
            report.syncs.clear()
            found = tracker.measure(now, step=1, **options).rows
            waits.append(len(report.syncs))
    assert waits[1] - waits[0] == 2
    for row, on_cpu in zip(found, right, strict=True):
        for side in ("left", "right"):
            bound = row["locking_error_bound"] + on_cpu["locking_error_bound"]
            assert abs(row[f"locking_{side}"] - on_cpu[f"locking_{side}"]) <= bound < 1e-3


def test_more_matrices_are_not_more_launches():
    few, many = (event(*weights((64, 64), count, 1e-3))[1] for count in (4, 12))
    assert many.launches - few.launches <= 2  # a concatenation of more parts
    assert len(many.syncs) == len(few.syncs)


def test_stacks_are_sized_for_a_device():
    """A 7B model's 3584 x 3584 matrices advance at least four at a time."""
    assert room.DEVICE_STACK_ENTRIES // 3584**2 >= 4


@pytest.mark.parametrize("factors", ["device", "host"])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 1e-2, 0.9])
def test_rows_are_those_of_the_cpu(eps: float, factors: str):
    """Every column, the null baselines included, and the arrays; small, refined and far updates."""
    base, tuned = weights((80, 64), 3, eps)
    cpu = SpectralTracker(SpectralBasis.from_tensors(base, modules="q")).measure(tuned, step=1, null_draws=2)
    record, _ = event(base, tuned, factors, null_draws=2)
    for mine, row in zip(record.rows, cpu.rows, strict=True):
        for column in COLUMNS:
            assert (mine[column] is None) == (row[column] is None), column
            if isinstance(row[column], float):
                assert mine[column] == pytest.approx(row[column], rel=1e-6, abs=1e-12), column
            else:
                assert mine[column] == row[column], column
    for name, values in cpu.arrays.items():
        torch.testing.assert_close(record.arrays[name], values, rtol=1e-9, atol=1e-9)
        assert type(record.arrays[name]) is Tensor


@pytest.mark.parametrize("choice", ["jacobi", "triton"])
def test_rows_are_those_of_the_cpu_where_the_device_solves_for_itself(choice: str):
    """One look at each core that it solved, the sweep's and the last."""
    base, tuned = weights((80, 64), 3, 1e-2)
    basis = SpectralBasis.from_tensors(base, modules="q")
    cpu, truth = (
        SpectralTracker(basis, engine=engine).measure(tuned, step=1) for engine in ("delta", "exact")
    )
    with chosen_jacobi(choice), warnings.catch_warnings():
        warnings.simplefilter("error")
        record, report = event(base, tuned)
    assert sum("linalg/solvers.py" in sync for sync in report.syncs) == 2
    for mine, row in zip(record.rows, cpu.rows, strict=True):
        for column in COLUMNS:
            if isinstance(row[column], float):
                if "bound" in column:
                    # Of residuals, which are rounding here, and other bases round otherwise; it must hold, of course.
                    assert row[column] / 3 <= mine[column] <= 3 * row[column], column
                else:
                    assert mine[column] == pytest.approx(row[column], rel=1e-6, abs=1e-12), column
        name = mine["name"]
        for array, bound in (("sigma", "sigma_error_bound"), ("sines_left", "angle_error_bound_rad")):
            error = (record.arrays[f"{name}/{array}"] - truth.arrays[f"{name}/{array}"]).abs().max()
            assert error <= mine[bound], array


def test_a_device_refuses_nan_by_name():
    base, tuned = weights((64, 64), 3, 1e-3)
    tuned["model.layers.1.self_attn.q_proj.weight"][3, 5] = float("nan")
    with pytest.raises(TensorError, match=r"layers\.1\.self_attn\.q_proj.*1 of 4096"):
        event(base, tuned)


# Waits and launches of one ``rlspec.svd`` of a batch: method, max_rounds -> both. Finite or not is two, of the matrix and
# of its values; the iteration asks for the spectrum, its first basis and the Ritz values, and in each round for a degree,
# Ritz values and how good they are. An exact decomposition is one transfer.
SVD_COUNTS = {
    ("exact", 1): (3, 12),
    ("randomized", 1): (8, 926),
    ("warm", 1): (8, 893),
    ("randomized", 2): (11, 1681),
}


def decomposed(
    a: Tensor, start: Tensor, method: str, rounds: int, tol: float = 1e-3, k: int = 24
) -> tuple[SVDResult, SVDResult, Report]:
    """By the CPU and by the pretend device, and what the latter's call asked for."""
    options = {"method": method, "tol": tol, "max_rounds": rounds}

    def run(a: Tensor, start: Tensor) -> SVDResult:
        first = rlspec.svd(start, k, method="exact") if method == "warm" else None
        counted.syncs.clear()
        counted.calls.clear()
        return rlspec.svd(a, k, warm_start=first, **options)

    with pretend_device() as counted:
        found = run(to_pretend(a), to_pretend(start))
        report = Report([*counted.syncs], counted.calls.copy())
        parts = (getattr(found, field).cpu() for field in FIELDS)
        there = SVDResult(*parts, found.method, found.rounds, found.notes)
    return run(a, start), there, report


FIELDS = ("U", "S", "Vh", "residuals", "subspace_bound")


def batch(count: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Matrices with evenly spaced singular values, and others nearby to start from."""
    g = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(count, *shape, generator=g, dtype=dtype), full_matrices=False)
    a = (u * (1.5 - torch.linspace(0, 1.3, min(shape), dtype=dtype))) @ vh
    return a, a + 1e-5 * torch.randn(a.shape, generator=g, dtype=dtype)


@pytest.mark.parametrize("case", SVD_COUNTS)
def test_waits_and_launches_of_a_decomposition(case: tuple[str, int]):
    waits, launches = SVD_COUNTS[case]
    tol = 1e-3 if case[1] == 1 else 1e-10  # which takes both rounds that are allowed
    for count in (3, 9):
        _, found, report = decomposed(*batch(count, (180, 150)), *case, tol=tol)
        assert (found.method, found.rounds) == (case[0], 0 if case[0] == "exact" else case[1])
        assert len(report.syncs) == waits, report.syncs
        if torch.__version__.startswith("2.13."):
            assert report.launches == launches
        for operation in ("linalg_qr", "_linalg_eigh", "_linalg_svd"):
            assert report.of(operation) == 0, f"{operation} ran on the device"


@pytest.mark.parametrize("method", ["exact", "randomized", "warm"])
@pytest.mark.parametrize("shape", [(180, 150), (150, 180)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decomposition_is_that_of_the_cpu(method: str, shape: tuple[int, int], dtype: torch.dtype):
    here, there, _ = decomposed(*batch(2, shape, dtype), method, 4)
    assert (there.method, there.rounds, there.notes) == (here.method, here.rounds, here.notes)
    for field in FIELDS:
        mine, wanted = getattr(there, field), getattr(here, field)
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-9)


def test_what_does_not_converge_on_a_device_is_decomposed_exactly_and_the_rest_stays():
    a, start = batch(3, (180, 150))
    u, _, vh = torch.linalg.svd(a[1], full_matrices=False)
    s = torch.linspace(1.5, 1.2, 150)
    s[24:] /= 10
    a[1] = (u * s) @ vh  # a filter gentle enough for it is too weak for the others, whatever is drawn
    here, there, report = decomposed(a, start, "randomized", 1, tol=1e-4)
    assert "2 of 3 did not reach tol" in there.notes[-1] and there.notes == here.notes
    for field in FIELDS:
        torch.testing.assert_close(getattr(there, field), getattr(here, field), rtol=1e-5, atol=1e-9)
    assert len(report.syncs) == SVD_COUNTS["randomized", 1][0] + 1
    assert report.of("_linalg_eigh") == report.of("_linalg_svd") == report.of("linalg_qr") == 0


def test_a_dependent_basis_on_a_device_is_orthonormalised_on_the_host():
    """Columns that CholeskyQR cannot part: LAPACK's QR takes over, on the host."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(2, 60, 8, generator=g, dtype=torch.float64)
    y[1, :, 5] = y[1, :, 2]
    with pretend_device() as report:
        q = orthonormal(to_pretend(y)).cpu()
    assert report.of("linalg_qr") == 0
    torch.testing.assert_close(
        q.mT @ q, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(q @ (q.mT @ y), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "solve",
    [
        dense.core_svd,
        dense.lapack_svd,
        dense.thin_svd,
        dense.householder,
        lambda a: dense.eigh(a.mT @ a),
        lambda a: (dense.singular_values(a),),
        lambda a: (dense.values_of_gram(a.mT @ a),),
    ],
)
def test_every_decomposition_of_a_device_is_one_transfer(solve: Callable[[Tensor], tuple[Tensor, ...]]):
    a = torch.eye(70) + 0.01 * torch.randn(3, 70, 70, generator=torch.Generator().manual_seed(0))
    a = a.double()
    with pretend_device() as report:
        found = solve(to_pretend(a))
        assert len(report.syncs) == 1, report.syncs
        assert all(x.is_cuda for x in found)
        found = tuple(x.cpu() for x in found)
    assert not [call for call in report.calls if call.startswith(("linalg_", "_linalg_"))]
    for mine, wanted in zip(found, solve(a), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-14)


MODES = ("directions", "values", "directions_and_values", "tail", "copy", "interpolate")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_matrix_is_restored_to_the_same_bits(mode: str, exact: bool, rounding: str):
    base, tuned = (next(iter(w.values())) for w in weights((96, 80), 1, 1e-2))

    def restored(base: Tensor, tuned: Tensor) -> rlspec.restore.RestoreResult:
        g = torch.Generator().manual_seed(1)
        options = {"mode": mode, "exact": exact, "rounding": rounding, "strength": 0.7, "generator": g}
        return rlspec.restore_matrix(base, tuned, 0.2, **options)

    here = restored(base, tuned)
    with pretend_device() as report:
        found = restored(to_pretend(base), to_pretend(tuned))
        assert found.weight.device.type == "cuda"
        assert torch.equal(found.weight.cpu(), here.weight)
    assert (found.method, found.entries_changed) == (here.method, here.entries_changed)
    for operation in ("linalg_qr", "_linalg_eigh", "_linalg_svd"):
        assert report.of(operation) == 0


def test_a_model_is_restored_where_it_is():
    base, tuned = weights((64, 64), 2, 1e-2)

    def model_of(tensors: dict[str, Tensor]) -> nn.Module:
        return named_module({n: nn.Parameter(t.clone(), requires_grad=False) for n, t in tensors.items()})

    basis = SpectralBasis.from_tensors(base, modules="q")
    here = model_of(tuned)
    rlspec.restore_(here, basis)
    with pretend_device():
        model = model_of(tuned)
        for owner in model.modules():
            for name, parameter in list(owner._parameters.items()):
                owner._parameters[name] = to_pretend(parameter.data)  # type: ignore[assignment]
        rlspec.restore_(model, basis)
        for name, parameter in model.named_parameters():
            assert parameter.device.type == "cuda"
            assert torch.equal(parameter.cpu(), here.get_parameter(name))


def test_a_checkpoint_is_restored_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``device`` moves the work; what is written is the CPU's. GPT-2's fused, transposed matrices, too."""
    for kind in ("llama", "gpt2"):
        base, tuned = pair(tmp_path / kind, kind)
        rlspec.restore_checkpoint(base, tuned, tmp_path / kind / "cpu", modules="attn", device="cpu")
        monkeypatch.setattr("rlspec.restore.options._choose_device", lambda name: name)
        with pretend_device() as report:
            rlspec.restore_checkpoint(base, tuned, tmp_path / kind / "gpu", modules="attn", device="cuda")
        monkeypatch.undo()
        assert report.of("bmm") > 0
        assert bytes_of(tmp_path / kind / "gpu") == bytes_of(tmp_path / kind / "cpu")


def test_a_pretend_device_refuses_what_cuda_refuses():
    """The helper's own guard: without it, nothing here would notice a tensor left behind on the CPU."""
    with pretend_device() as report:
        a = to_pretend(torch.ones(3))
        with pytest.raises(RuntimeError, match="same device"):
            a + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            a.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        assert float(a.sum()) == 3.0 and len(report.syncs) == 1
