"""Checkpoints measured on a device: their weights arrive there from the stream, and the rows are those of the CPU. A
pretend device, to which copies happen as late as a GPU's may."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import DEVICE, Pretend, pretend_device, to_pretend
from restore_toys import save_model
from safetensors.torch import save_file
from series_toys import loaded, make_run
from torch import Tensor

import rlspec
from rlspec.io import stream as stream_module
from rlspec.io.projections import find_projections, parse_modules
from rlspec.io.weights import CheckpointWeights
from rlspec.jobs.series import job as jobs

pytestmark = pytest.mark.usefixtures("own_cache")


class LatePretend:
    """Copies that happen when they are waited for; a buffer that is given up or read into before shows."""

    def __init__(self) -> None:
        self.begun = 0

    def begin(self, source: Tensor) -> tuple[int, Tensor]:
        self.begun += 1
        return source.data_ptr(), torch.empty_like(source)

    def finish(self, copy: tuple[int, Tensor]) -> Tensor:
        address, target = copy
        ctypes.memmove(target.data_ptr(), address, target.nbytes)
        return to_pretend(target)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[LatePretend]:
    made, right = LatePretend(), stream_module.copies_to
    monkeypatch.setattr(
        stream_module, "copies_to", lambda device: made if device.type == "cuda" else right(device)
    )
    monkeypatch.setattr(stream_module, "pinning", lambda device: (0, 0, 0, 0))
    monkeypatch.setattr(jobs, "choose_device", torch.device)
    with pretend_device():
        yield made


def rows(series: Any) -> list[dict[str, Any]]:
    return [row for spectra in series for row in spectra.rows]


def on_cpu(*places: Path, **options: Any) -> list[dict[str, Any]]:
    return rows(rlspec.measure(*places, device="cpu", **options))


def test_rows_on_a_device_are_those_of_the_cpu(tmp_path: Path, copies: LatePretend) -> None:
    """Of shards, too; every tensor that is measured is copied by its stream, once a checkpoint."""
    run = make_run(tmp_path)
    right = on_cpu(run.parent / "base", run)
    assert copies.begun == 0
    found = rows(rlspec.measure(run.parent / "base", run, device="cuda:0"))
    assert copies.begun == len(found) == len(right) > 0
    for row, here in zip(found, right, strict=True):
        assert (row["name"], row["step"], row["engine"]) == (here["name"], here["step"], here["engine"])
        bound = row["angle_error_bound_rad"] + here["angle_error_bound_rad"]
        assert abs(row["angle_left_max_rad"] - here["angle_left_max_rad"]) <= bound
        assert row["delta_frobenius"] == pytest.approx(here["delta_frobenius"], rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_matrices_of_tensors_of_every_layout_arrive(kind: str, tmp_path: Path, copies: LatePretend) -> None:
    """Bit for bit: fused, transposed and plain ones."""
    save_model(tmp_path, kind, dtype=torch.bfloat16)
    weights = CheckpointWeights(tmp_path)
    projections = find_projections(weights.shapes(), parse_modules("all"), weights.config())
    there = weights.on(DEVICE)
    for (_, right), (_, found) in zip(weights.stream(projections), there.stream(projections), strict=True):
        assert isinstance(found, Pretend) and torch.equal(found.cpu(), right)
    assert copies.begun == len({p.tensor for p in projections})
    assert not any(isinstance(w, Pretend) for _, w in weights.stream(projections))  # which stays where it was


def test_codes_meet_their_scales_on_the_host(tmp_path: Path, copies: LatePretend) -> None:
    codes = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    stored = dict.fromkeys(names, codes) | {f"{name}_scale_inv": torch.full((2, 2), 0.5) for name in names}
    save_file({name: t.clone() for name, t in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"weight_block_size": [32, 32]}}')
    weights = CheckpointWeights(tmp_path).on(DEVICE)
    projections = find_projections(weights.shapes(), parse_modules("q"), weights.config())
    matrices = [found for _, found in weights.stream(projections)]
    assert len(matrices) == 2 and copies.begun == 0
    assert all(torch.equal(found, codes.float() * 0.5) for found in matrices)


def test_one_tensor_alone_comes_as_before(tmp_path: Path, copies: LatePretend) -> None:
    """Nothing is read or copied beside it, for which its buffer would be worth pinning."""
    save_model(tmp_path, "llama")
    weights = CheckpointWeights(tmp_path)
    (first, *_) = find_projections(weights.shapes(), parse_modules("q"), weights.config())
    ((_, found),) = weights.on(DEVICE).stream([first])
    assert not isinstance(found, Pretend) and copies.begun == 0


def test_adapters_meet_their_base_on_the_host(tmp_path: Path, copies: LatePretend) -> None:
    peft = pytest.importorskip("peft")
    save_model(tmp_path / "base", "llama")
    model = peft.get_peft_model(loaded(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            p.data = 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(tmp_path / "adapter")
    right = on_cpu(tmp_path / "base", tmp_path / "adapter")
    found = rows(rlspec.measure(tmp_path / "base", tmp_path / "adapter", device="cuda:0"))
    assert copies.begun == 0 and len(found) == len(right)
    for row, here in zip(found, right, strict=True):
        assert row["delta_frobenius"] == pytest.approx(here["delta_frobenius"], rel=1e-5)
