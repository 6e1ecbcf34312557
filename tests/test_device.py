"""On a device: the same numbers as on the CPU, few waits, few launches. A pretend one where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretend import Report, pretend_device, to_pretend
from restore_toys import bytes_of, pair
from torch import Tensor, nn

import rlspec
from rlspec.errors import TensorError
from rlspec.spectra import SpectralBasis, SpectralTracker
from rlspec.spectra import tracker as tracker_module
from rlspec.spectra.table import COLUMNS

# Waits of the host and launches of one event over one stack: (shape, matrices, size of the update) -> both. A change that
# moves them says so here. The host waits for the sums, the cores, what decides, and the results; a sweep adds two.
COUNTS = {
    "first order": ((192, 192), 6, 1e-3, 4, 251),
    "one sweep": ((192, 192), 6, 1e-2, 6, 451),
    "wide": ((96, 192), 4, 1e-3, 4, 276),
    "tall": ((192, 96), 4, 1e-3, 4, 275),
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


def test_more_matrices_are_not_more_launches():
    few, many = (event(*weights((64, 64), count, 1e-3))[1] for count in (4, 12))
    assert many.launches - few.launches <= 2  # a concatenation of more parts
    assert len(many.syncs) == len(few.syncs)


def test_stacks_are_sized_for_a_device():
    """A 7B model's 3584 x 3584 matrices advance at least four at a time."""
    assert tracker_module._DEVICE_STACK_ENTRIES // 3584**2 >= 4


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


def test_a_device_refuses_nan_by_name():
    base, tuned = weights((64, 64), 3, 1e-3)
    tuned["model.layers.1.self_attn.q_proj.weight"][3, 5] = float("nan")
    with pytest.raises(TensorError, match=r"layers\.1\.self_attn\.q_proj.*1 of 4096"):
        event(base, tuned)


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

    class Model(nn.Module):
        def __init__(self, tensors: dict[str, Tensor]) -> None:
            super().__init__()
            for name, tensor in tensors.items():
                owner: nn.Module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(owner, part):
                        owner.add_module(part, nn.Module())
                    owner = getattr(owner, part)
                setattr(owner, last, nn.Parameter(tensor.clone(), requires_grad=False))

    basis = SpectralBasis.from_tensors(base, modules="q")
    here = Model(tuned)
    rlspec.restore_(here, basis)
    with pretend_device():
        model = Model(tuned)
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
        monkeypatch.setattr("rlspec.restore.options.choose_device", lambda name: name)
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
