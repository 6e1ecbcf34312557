"""Switches that people set for their training, around every public entry point: no bit of ours changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from module_toys import named_module
from safetensors.torch import save_file
from torch import Tensor, nn

import rlspec
from rlspec.linalg import flags, precision
from rlspec.spectra.dealt import DealtTracker

Q, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv")
SIDE = 256  # from about 200 on, torch's routes for float32 products differ


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
        assert read() == value  # what the user had set is as it was
    finally:
        write(before)


def attribute(holder: Any, name: str, value: Any) -> AbstractContextManager[None]:
    return setting(lambda: getattr(holder, name), lambda v: setattr(holder, name, v), value)


def precision_of(value: str) -> AbstractContextManager[None]:
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype=dtype):
        yield
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


@contextmanager
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
        assert torch.is_inference_mode_enabled()


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def deterministic() -> AbstractContextManager[None]:
    switch = torch.use_deterministic_algorithms
    return setting(torch.are_deterministic_algorithms_enabled, switch, True)


SWITCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "medium": lambda: precision_of("medium"),
    "high": lambda: precision_of("high"),
    "TF32 on CUDA": lambda: attribute(torch.backends.cuda.matmul, "allow_tf32", True),
    "oneDNN off": lambda: attribute(torch.backends.mkldnn, "enabled", False),
    "oneDNN deterministic": lambda: attribute(torch.backends.mkldnn, "deterministic", True),
    "autocast bfloat16": lambda: autocast(torch.bfloat16),
    "autocast float16": lambda: autocast(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "inference mode": inference,
    "no gradients": torch.no_grad,
}
if flags.has_backend_flags():
    MKLDNN: Any = torch.backends.mkldnn
    SWITCHES |= {
        "oneDNN bfloat16": lambda: attribute(MKLDNN.matmul, "fp32_precision", "bf16"),
        "oneDNN ieee": lambda: attribute(MKLDNN.matmul, "fp32_precision", "ieee"),
        "CUDA tf32": lambda: attribute(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    }


def projections(weights: dict[str, Tensor]) -> nn.Module:
    return named_module({name: nn.Parameter(weight.clone()) for name, weight in weights.items()})


def planted(rows: int, g: torch.Generator) -> Tensor:
    u = torch.linalg.qr(torch.randn(rows, rows, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(SIDE, rows, generator=g, dtype=torch.float64)).Q
    return ((u * torch.linspace(2.0, 0.5, rows, dtype=torch.float64)) @ v.T).float()


class Entries:
    """Every public entry point on the same weights; each gives the tensors and texts of its result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        g = torch.Generator().manual_seed(0)
        self.base = {Q: planted(SIDE, g), V: planted(SIDE // 2, g)}
        noise = {name: torch.randn(w.shape, generator=g) for name, w in self.base.items()}
        self.tuned = {name: w + 1e-3 * noise[name] for name, w in self.base.items()}
        self.end = {name: w + 3e-3 * noise[name] for name, w in self.base.items()}
        self.basis = rlspec.SpectralBasis.from_tensors(self.base, modules="q,v")
        for name, weights in (("base", self.base), ("tuned", self.tuned)):
            (folder / name).mkdir()
            save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
            (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))

    def from_model(self) -> list[Any]:
        basis = rlspec.SpectralBasis.from_model(projections(self.base), modules="q,v")
        parts = [basis.matrix(p.name) for p in basis.projections]
        assert not any(m.U.is_inference() or m.U.requires_grad for m in parts)
        return [x for m in parts for x in (m.W, m.U, m.S, m.Vh)]

    def from_checkpoint(self) -> list[Any]:
        basis = rlspec.SpectralBasis.from_checkpoint(self.folder / "base", modules="q,v")
        return [x for p in basis.projections for x in (basis.matrix(p.name).U, basis.matrix(p.name).S)]

    def measure(self) -> list[Any]:
        record = rlspec.SpectralTracker(self.basis).measure(self.tuned, step=1, null_draws=2)
        assert {row["engine"] for row in record.rows} == {"delta"}
        assert {row["arithmetic"] for row in record.rows} == {"float32"}
        return [*record.arrays.values(), json.dumps(record.rows)]

    def measure_exact(self) -> list[Any]:
        record = rlspec.SpectralTracker(self.basis, engine="exact").measure(self.tuned, step=1)
        assert {(row["engine"], row["arithmetic"]) for row in record.rows} == {("exact", "float64")}
        return [*record.arrays.values(), json.dumps(record.rows)]

    def measure_against_an_end(self) -> list[Any]:
        found = []
        for engine in ("delta", "exact"):
            tracker = rlspec.SpectralTracker(self.basis, engine=engine)  # type: ignore[arg-type]
            record = tracker.measure(self.tuned, step=1, end=tracker.subspaces(self.end))
            assert all(0.99 < row["locking_right"] < 1.0 for row in record.rows)
            found.append(json.dumps(record.rows))
        return found

    def measure_dealt(self) -> list[Any]:
        tracker = DealtTracker(projections(self.base), modules="q,v")
        record = tracker.measure(projections(self.tuned), step=1)
        assert {row["arithmetic"] for row in record.rows} == {"float32"}
        return [json.dumps(record.rows)]

    def svd_randomized(self) -> list[Any]:
        found = rlspec.svd(self.tuned[Q], 40, method="randomized", tol=1e-3)
        assert found.method == "randomized"
        return [found.U, found.S, found.Vh, found.residuals, found.subspace_bound, str(found.rounds)]

    def svd_exact(self) -> list[Any]:
        found = rlspec.svd(self.tuned[V], 10, method="exact")
        return [found.U, found.S, found.Vh, found.residuals, found.subspace_bound]

    def restore_matrix(self) -> list[Any]:
        found = rlspec.restore_matrix(self.base[Q], self.tuned[Q], 0.2)
        assert found.method == "delta"
        return [found.weight, str(found.change_frobenius), str(found.error_estimate)]

    def restore_(self) -> list[Any]:
        model = projections(self.tuned)
        reports = rlspec.restore_(model, self.basis, rounding="stochastic")
        assert {row.method for row in reports} == {"delta"}
        return [p.detach() for p in model.parameters()]

    def restore_checkpoint(self) -> list[Any]:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        report = rlspec.restore_checkpoint(self.folder / "base", self.folder / "tuned", out, modules="q,v")
        assert {row.method for row in report.matrices} == {"delta"}
        return [(out / "model.safetensors").read_bytes().hex()]

    def all(self) -> dict[str, list[Any]]:
        names = [n for n, f in vars(Entries).items() if callable(f) and n not in ("__init__", "all")]
        return {name: getattr(self, name)() for name in names}


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    return Entries(tmp_path_factory.mktemp("switches"))


@pytest.fixture(scope="module")
def plain(entries: Entries) -> dict[str, list[Any]]:
    return entries.all()


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else x == y for x, y in pairs
    )


@pytest.mark.parametrize("switch", SWITCHES)
def test_no_switch_changes_a_bit_or_the_engine(
    switch: str, entries: Entries, plain: dict[str, list[Any]]
) -> None:
    with SWITCHES[switch]():
        found = entries.all()
    assert [name for name in plain if not same(plain[name], found[name])] == []


@pytest.mark.parametrize("switch", ["autocast bfloat16", "medium"])
def test_without_the_pins_switches_do_change_results(
    switch: str, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: an entry gives other bits, or leaves the delta engine, or fails."""
    if switch == "medium" and not flags.own_kernels_pay():
        pytest.skip("this CPU multiplies float32 matrices in one way only")
    monkeypatch.setattr(precision, "flags", list)
    monkeypatch.setattr(precision, "_thread_modes", lambda: [torch.no_grad()])
    for entry in (entries.measure, entries.svd_randomized):
        before = entry()
        with SWITCHES[switch]():
            try:
                changed = not same(before, entry())
            except (AssertionError, NotImplementedError):
                changed = True
        assert changed, entry.__name__
