"""LoRA measured through its factors: against PEFT's own merge in float64, from a module and from a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from restore_toys import parts, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rlspec
from rlspec.errors import TensorError
from rlspec.io.updates import Update
from rlspec.perturb.delta import LowRankDelta
from rlspec.spectra import SpectralBasis, SpectralRecord, SpectralTracker

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("own_cache")
F64 = torch.float64
Q0 = "model.layers.0.self_attn.q_proj.weight"

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "separate": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "rank stabilised": ("llama", {"target_modules": ["q_proj", "k_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6},
            "alpha_pattern": {r"layers\.0\..*q_proj": 3},
        },
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "fused in turn": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "fused": ("phi3", {"target_modules": ["qkv_proj"]}),
}


def adapted(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A base in ``folder/base``, and a PEFT model on it whose adapters do something."""
    save_model(folder / "base", kind, dtype=dtype)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, **changes)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.03)
    return model


def true_weights(kind: str, model: Any) -> dict[str, torch.Tensor]:
    """The matrices that PEFT merges in float64, by the end of their names: "0 q"."""
    merged = copy.deepcopy(model).double().merge_and_unload().state_dict()
    found = {}
    for name, tensor in merged.items():
        for label, part in parts(kind, name, tensor).items():
            layer = next(piece for piece in name.split(".") if piece.isdigit())
            found[f"{layer} {label}"] = part.reshape(-1, 64)
    return found


def assert_true(
    record: SpectralRecord, basis: SpectralBasis, truth: dict[str, torch.Tensor], *, scale: float = 1.0
) -> None:
    """Values, angles, norms and counts are those of float64 weights, within the bounds that the rows tell."""
    for row in record.rows:
        matrix = basis.matrix(str(row["name"]))
        k, base = matrix.k, matrix.W.double()
        e = scale * (truth[f"{row['layer']} {row['module']}"] - base)
        u, s, vh = torch.linalg.svd(base + e, full_matrices=False)
        u_ref, _, vh_ref = torch.linalg.svd(base, full_matrices=False)
        sigma, bound = record.arrays[f"{matrix.name}/sigma"], row["sigma_error_bound"]
        assert float((sigma - s[:k]).abs().max()) <= bound + 1e-13
        for side, ours, ref in (("left", u[:, :k], u_ref[:, :k]), ("right", vh[:k].T, vh_ref[:k].T)):
            sines = torch.linalg.svdvals(ours - ref @ (ref.T @ ours))
            angles = record.arrays[f"{matrix.name}/sines_{side}"].asin()
            error = float((angles - sines.clamp(max=1.0).asin()).abs().max())
            assert error <= row["angle_error_bound_rad"] + 1e-9, row["name"]
        assert row["delta_frobenius"] == pytest.approx(float(e.norm()), rel=1e-6)
        unchanged = e.abs() <= 1e-3 * torch.maximum((base + e).abs(), base.abs())
        assert row["update_sparsity"] == pytest.approx(float(unchanged.double().mean()), abs=1e-12)


def forbid_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing may form s B A, nor W + s B A."""

    def formed(*args: Any) -> Any:
        raise AssertionError("the product of the factors was formed")

    for owner, name in ((Update, "added_to"), (LowRankDelta, "dense"), (LowRankDelta, "weight")):
        monkeypatch.setattr(owner, name, formed)
    for place in ("rlspec.io.weights.with_adapters", "rlspec.io.adapter.Adapter.add_update"):
        monkeypatch.setattr(place, formed)


@pytest.mark.parametrize("case", KINDS)
def test_factors_give_what_the_merged_weights_do(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes = KINDS[case]
    model = adapted(tmp_path, kind, **changes)
    model.save_pretrained(tmp_path / "run" / "checkpoint-7")
    truth = true_weights(kind, model)
    basis = SpectralBasis.from_checkpoint(tmp_path / "base")
    forbid_products(monkeypatch)
    record = SpectralTracker(basis).measure(model, step=7)
    assert_true(record, basis, truth)
    with pytest.raises(AssertionError):  # another scale would be seen
        assert_true(record, basis, truth, scale=1.001)
    (spectra,) = rlspec.measure(tmp_path / "base", tmp_path / "run")
    for row, right in zip(spectra.rows, record.rows, strict=True):
        assert row == {**right, "checkpoint": "checkpoint-7", "stage": ""}
        changed = not (kind == "llama" and f"{row['module']}_proj" not in changes["target_modules"])
        assert (row["delta_frobenius"] > 0) == changed and (row["angle_left_max_rad"] > 0) == changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
def test_the_base_may_be_of_any_dtype(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tmp_path, "llama", dtype=dtype, target_modules=["q_proj", "v_proj"])
    basis = SpectralBasis.from_checkpoint(tmp_path / "base")
    truth = true_weights("llama", model)
    forbid_products(monkeypatch)
    assert_true(SpectralTracker(basis).measure(model, step=1), basis, truth)


def test_several_adapters_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tmp_path, "llama", target_modules=["q_proj"])
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "second" in name:
                parameter.normal_(std=0.03)
    model.base_model.set_adapter(["default", "second"])
    basis = SpectralBasis.from_checkpoint(tmp_path / "base")
    truth = true_weights("llama", model)
    forbid_products(monkeypatch)
    assert_true(SpectralTracker(basis).measure(model, step=1), basis, truth)


@pytest.mark.parametrize("engine", ["delta", "exact"])
def test_a_base_that_is_not_the_reference_is_measured_merged(engine: Any, tmp_path: Path) -> None:
    """Also where only some matrices differ: those of one stack are then measured in two forms."""
    model = adapted(tmp_path, "llama", target_modules=["q_proj", "v_proj"])
    basis = SpectralBasis.from_checkpoint(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1" in name and "base_layer" in name:
                parameter.mul_(1.01)
    record = SpectralTracker(basis, engine=engine).measure(model, step=1, null_draws=1)
    truth = true_weights("llama", model)
    for row in record.rows:  # norms of a merged float32 weight are those of its entries' rounding
        matrix = basis.matrix(row["name"])
        e = truth[f"{row['layer']} {row['module']}"] - matrix.W.double()
        assert row["delta_frobenius"] == pytest.approx(float(e.norm()), rel=1e-5, abs=1e-12)
        sigma = torch.linalg.svdvals(matrix.W.double() + e)[: matrix.k]
        error = float((record.arrays[f"{matrix.name}/sigma"] - sigma).abs().max())
        assert error <= row["sigma_error_bound"] + 1e-6 * float(sigma[0])
        assert 0 < row["null_rounding_rad"] < 0.05


def test_merged_adapters_and_whole_modules_are_measured_as_weights(tmp_path: Path) -> None:
    model = adapted(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["v_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01)
    basis = SpectralBasis.from_checkpoint(tmp_path / "base")
    apart = SpectralTracker(basis).measure(model, step=1).rows
    model.merge_adapter()
    merged = SpectralTracker(basis).measure(model, step=1).rows
    for row, right in zip(apart, merged, strict=True):
        assert row["delta_frobenius"] == pytest.approx(right["delta_frobenius"], rel=1e-5)
        assert (row["delta_frobenius"] > 0) == (row["module"] != "k")


def test_an_unchanged_adapter_changes_nothing(tmp_path: Path) -> None:
    model = adapted(tmp_path, "llama", target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    basis = SpectralBasis.from_checkpoint(tmp_path / "base")
    for row in SpectralTracker(basis).measure(model, step=0).rows:
        zeros = (
            "delta_frobenius",
            "angle_left_max_rad",
            "nss_k",
            "sigma_error_bound",
            "angle_error_bound_rad",
        )
        assert [row[name] for name in zeros] == [0.0] * len(zeros) and row["update_sparsity"] == 1.0


def test_factors_that_are_not_finite_are_told(tmp_path: Path) -> None:
    model = adapted(tmp_path, "llama", target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "run" / "checkpoint-7")
    path = tmp_path / "run" / "checkpoint-7" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{Q0.removesuffix('.weight')}.lora_A.weight"
    for value, told in (
        (torch.nan, r"checkpoint-7: the adapter of .*0\.self_attn\.q_proj\.weight: 1 of 256 values are NaN"),
        # The factors are finite, and so is their product in float64; as weights of the model it is not.
        (3e38, r"checkpoint-7: .*0\.self_attn\.q_proj\.weight: \d+ of 4096 values are NaN or infinite"),
    ):
        spoilt = {key: tensors[key].clone(), key.replace("lora_A", "lora_B"): torch.full((64, 4), 10.0)}
        spoilt[key][0, 0] = value
        save_file({**tensors, **spoilt}, path)
        with pytest.raises(TensorError, match=told):
            rlspec.measure(tmp_path / "base", tmp_path / "run")


def test_the_start_of_a_training_is_a_base_as_its_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new adapter adds zeros, and the reference that is taken then holds the base's numbers in float32."""
    model = adapted(tmp_path, "llama", dtype=torch.bfloat16, target_modules=["q_proj", "v_proj"])
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for name in factors:
            model.get_parameter(name).zero_()
    basis = SpectralBasis.from_model(model)
    with torch.no_grad():
        for name, value in factors.items():
            model.get_parameter(name).copy_(value)
    truth = true_weights("llama", model)
    forbid_products(monkeypatch)
    assert_true(SpectralTracker(basis).measure(model, step=1), basis, truth)
