"""Scaled fp8 against float64 and the code of transformers; every other quantised form is refused, by every reader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from module_toys import named_module
from restore_toys import pair, rewrite, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import rlspec
from rlspec.errors import CheckpointError, ProjectionError, RlspecError, TensorError
from rlspec.io.quantised import block_size, scaled
from rlspec.jobs.loading import check_checkpoint, load_model

F8 = torch.float8_e4m3fn
Q0 = "model.layers.0.self_attn.q_proj.weight"


def spread(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """The scale of every entry, float64, by its indices."""
    i = torch.arange(shape[0]) // block[0]
    j = torch.arange(shape[1]) // block[1]
    return scale.double()[i][:, j]


def quantised(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, codes * scales in float64) with one scale of a block's largest entry."""
    m, n = weight.shape
    grid = math.ceil(m / block[0]), math.ceil(n / block[1])
    scale = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = part.abs().max() / 448
    wide = spread(scale, (m, n), block)
    codes = (weight / wide).to(F8)
    return codes, scale, codes.double() * wide


def codes_values(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """codes * scale in float64."""
    return codes.double() * spread(scale, (codes.shape[0], codes.shape[1]), block)


def assert_half_a_step(found: Tensor, truth: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """No code of e4m3 (three bits of mantissa, subnormal steps of 2^-9) is nearer, give or take float32's rounding."""
    wide = spread(scale, (found.shape[0], found.shape[1]), block)
    step = torch.exp2(torch.floor(torch.log2((truth / wide).abs()).clamp_min(-6))) / 8
    assert ((found - truth).abs() <= wide * step * 0.5 * 1.0001).all()


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((256, 128), (64, 64)),
        ((201, 320), (128, 128)),
        ((96, 64), (1, 64)),
        ((96, 64), (1, 32)),
        ((96, 64), (96, 64)),
    ],
)
def test_rows_and_blocks_are_codes_times_scale(shape: tuple[int, int], block: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.logspace(0, -3, shape[0])[:, None]
    codes, scale, truth = quantised(weight, block)
    found = scaled("w", codes, "s", scale, block)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=2**-23, atol=0)
    # Without the configuration: powers of two and divisors leave one choice here.
    torch.testing.assert_close(scaled("w", codes, "s", scale), found, rtol=0, atol=0)
    if scale.shape[1] == 1:
        torch.testing.assert_close(scaled("w", codes, "s", scale.flatten()), found, rtol=0, atol=0)


def test_scales_equal_those_of_transformers() -> None:
    """Its layer's own dequantisation with a stated block, and its loader's for every dtype of scale."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

    codes = torch.randn(192, 320).to(F8)
    scale = torch.rand(2, 3)
    theirs = _dequantize_fp8_weight(codes, scale, [128, 128], torch.float32)
    torch.testing.assert_close(scaled("w", codes, "s", scale, (128, 128)), theirs, rtol=0, atol=0)
    exponents = torch.randint(110, 130, (192, 10), dtype=torch.uint8)
    for grid in (
        scale[:, :2],
        scale[:1, :1],
        scale[:, :2].bfloat16(),
        exponents,
        exponents.view(torch.float8_e8m0fnu),
    ):
        theirs = Fp8Dequantize(None)._dequantize_one(codes[:, :320], grid, output_dtype=torch.float32)
        block = (192 // grid.shape[0], 320 // grid.shape[1])
        torch.testing.assert_close(scaled("w", codes, "s", grid, block), theirs, rtol=0, atol=0)


def test_a_scale_that_does_not_determine_the_block_is_refused() -> None:
    codes = torch.randn(192, 64).to(F8)
    with pytest.raises(TensorError, match=r"s: \(2, 1\) does not scale w \(192, 64\) .*weight_block_size"):
        scaled("w", codes, "s", torch.ones(2, 1))  # 96 rows, or 128 and 64
    for shape in ((5, 1), (64,), (2, 1, 1), (0, 1)):
        with pytest.raises(TensorError, match="does not scale w"):
            scaled("w", codes, "s", torch.ones(shape), (128, 128))
    with pytest.raises(TensorError, match="s: a scale of torch.int32"):
        scaled("w", codes, "s", torch.ones(192, 1, dtype=torch.int32))


def test_the_block_is_read_from_either_kind_of_configuration() -> None:
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}}
    assert block_size(fp8) == (128, 64)
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}}
    other = {"weights": {"strategy": "channel", "block_structure": None}}
    groups = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group, "group_1": other}}
    assert block_size({"quantization_config": groups}) == (128, 128)
    for nothing in (
        None,
        {},
        {"quantization_config": {"weight_block_size": None}},
        {"quantization_config": {"weight_block_size": [True, True]}},
        {"quantization_config": {"weight_block_size": [0, 128]}},
        {"quantization_config": "fp8"},
    ):
        assert block_size(nothing) is None


def tensors_in(scheme: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A q matrix stored in fp8, and the numbers that are meant."""
    blocks = {"_scale_inv": (32, 32), "_scale": (1, 64), "scalar": (80, 64), "plain": (1, 1)}
    if scheme == "plain":
        codes = weight.to(F8)
        return {Q0: codes}, codes.double()
    codes, scale, truth = quantised(weight, blocks[scheme])
    name = Q0 + ("_scale" if scheme == "scalar" else scheme)
    return {Q0: codes, name: scale.reshape(()) if scheme == "scalar" else scale}, truth


@pytest.mark.parametrize("scheme", ["_scale_inv", "_scale", "scalar", "plain"])
def test_basis_and_tracker_read_fp8_as_the_numbers_that_it_means(scheme: str, tmp_path: Path) -> None:
    """From a folder, from tensors and from a module, as a reference and as what is measured."""
    reference = torch.randn(80, 64) * torch.logspace(0, -2, 80)[:, None]
    tuned = reference + 0.01 * reference.norm() / reference.numel() ** 0.5 * torch.randn(80, 64)
    stored, truth = tensors_in(scheme, tuned)
    save_file(stored, tmp_path / "model.safetensors")
    config = {"quantization_config": {"weight_block_size": [32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = configured_module(stored)
    cache = tmp_path / "cache"
    plain = rlspec.SpectralBasis.from_tensors({Q0: truth}, modules="q", cache_dir=cache)
    right = rlspec.SpectralTracker(
        rlspec.SpectralBasis.from_tensors({Q0: reference.double()}, modules="q", cache_dir=cache),
        engine="exact",
    ).measure({Q0: truth}, step=0)
    tracker = rlspec.SpectralTracker(
        rlspec.SpectralBasis.from_tensors({Q0: reference}, modules="q", cache_dir=cache)
    )
    for source in (tmp_path, stored, module):
        row = tracker.measure(source, step=1).rows[0]
        for key in ("angle_left_mean_rad", "angle_right_mean_rad", "angle_left_max_rad"):
            assert abs(row[key] - right.rows[0][key]) <= row["angle_error_bound_rad"] + 1e-6
        make = (
            rlspec.SpectralBasis.from_model
            if source is module
            else rlspec.SpectralBasis.from_tensors
            if source is stored
            else rlspec.SpectralBasis.from_checkpoint
        )
        basis = make(source, modules="q", cache_dir=cache)  # type: ignore[operator]
        torch.testing.assert_close(basis.matrix(Q0).S, plain.matrix(Q0).S, rtol=1e-6, atol=1e-6)


class _Config:
    """What a model's configuration says of itself, as transformers does."""

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "llama", "quantization_config": {"weight_block_size": [32, 32]}}


def configured_module(tensors: dict[str, Tensor]) -> torch.nn.Module:
    """A module whose parameters have those names, with its configuration."""
    frozen = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    root = named_module(frozen)
    root.config = _Config()  # type: ignore[assignment]
    return root


def test_layers_of_transformers_are_read_with_their_block(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=192, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    codes, scale, truth = quantised(weight, (128, 128))
    layer = FP8Linear(192, 192, block_size=(128, 128))
    layer.weight.data, layer.weight_scale_inv.data = codes, scale
    model.model.layers[0].self_attn.q_proj = layer
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    basis = rlspec.SpectralBasis.from_model(model, modules="q", cache_dir=tmp_path)
    torch.testing.assert_close(basis.matrix(Q0).W.double(), truth, rtol=2**-23, atol=0)
    reference = rlspec.SpectralBasis.from_tensors(
        {Q0: truth + 0.01 * torch.randn(192, 192, dtype=torch.float64) * truth.std()},
        modules="q",
        cache_dir=tmp_path,
    )
    (told,) = rlspec.restore_(model, reference, mode="copy")
    assert told.dtype == "float8_e4m3fn" and told.rounding_share > 0
    after = codes_values(layer.weight.data, layer.weight_scale_inv.data, (128, 128))
    assert_half_a_step(after, reference.matrix(Q0).W.double(), layer.weight_scale_inv.data, (128, 128))
    assert told.entries_changed == int((after != truth).sum())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_model_in_memory_gets_the_codes_that_its_checkpoint_gets(rounding: Any, tmp_path: Path) -> None:
    folders = tmp_path / "base", tmp_path / "tuned"
    weight = torch.randn(80, 64)
    for folder, moved in zip(folders, (0.0, 0.2)):
        folder.mkdir()
        stored, _ = tensors_in("_scale_inv", weight + moved * torch.randn(80, 64))
        save_file(stored, folder / "model.safetensors")
        (folder / "config.json").write_text(
            json.dumps({"quantization_config": {"weight_block_size": [32, 32]}})
        )
    rlspec.restore_checkpoint(*folders, tmp_path / "out", modules="q", rounding=rounding)
    right = load_file(tmp_path / "out" / "model.safetensors")
    module = configured_module(stored)
    codes = stored[Q0].clone()
    basis = rlspec.SpectralBasis.from_checkpoint(folders[0], modules="q")
    (row,) = rlspec.restore_(module, basis, rounding=rounding)
    found = module.state_dict()
    assert row.entries_changed > 0 and not torch.equal(found[Q0].view(torch.uint8), codes.view(torch.uint8))
    for name, tensor in right.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_scales_that_cannot_be_written_are_refused_and_nothing_is(tmp_path: Path) -> None:
    stored, _ = tensors_in("scalar", torch.randn(80, 64))
    other = Q0.replace("q_proj", "k_proj")
    both = {**stored, other: stored[Q0].clone(), other + "_scale": stored[Q0 + "_scale"]}
    basis = rlspec.SpectralBasis.from_tensors(
        {Q0: torch.randn(80, 64), other: torch.randn(80, 64)}, modules="q,k", cache_dir=tmp_path
    )
    shared = configured_module(both)
    shared.model.layers._modules["0"].self_attn.k_proj.weight_scale = (  # type: ignore[union-attr]
        shared.model.layers._modules["0"].self_attn.q_proj.weight_scale  # type: ignore[union-attr]
    )
    meta = configured_module({**both, other + "_scale": both[Q0 + "_scale"].to("meta")})
    for module, message in (
        (shared, "one tensor with .*_scale in the model"),
        (meta, "_scale: on the meta dev"),
    ):
        before = {name: t.clone() for name, t in module.state_dict().items()}
        with pytest.raises(TensorError, match=message):
            rlspec.restore_(module, basis, mode="copy")
        for name, tensor in module.state_dict().items():
            assert tensor.is_meta or torch.equal(
                tensor.view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8)
            )


def test_adapters_on_a_scaled_base_are_added_to_its_numbers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    stored, truth = tensors_in("_scale_inv", torch.randn(80, 64))
    layer = torch.nn.Linear(64, 80, bias=False)
    module = configured_module(stored)
    module.model.layers._modules["0"].self_attn.q_proj = layer  # type: ignore[union-attr]
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    lora = adapted.base_model.model.model.layers._modules["0"].self_attn.q_proj
    lora.base_layer.weight.requires_grad_(False).data = stored[Q0]
    lora.base_layer.weight_scale_inv = torch.nn.Parameter(stored[Q0 + "_scale_inv"])
    lora.lora_B["default"].weight.data.normal_()
    a, b = (factors["default"].weight.detach().double() for factors in (lora.lora_A, lora.lora_B))
    basis = rlspec.SpectralBasis.from_model(adapted, modules="q", cache_dir=tmp_path)
    torch.testing.assert_close(basis.matrix(Q0).W.double(), truth + 3 * b @ a, rtol=1e-6, atol=1e-6)


class _SelfScaled(Tensor):
    """A tensor that says it is float32 and holds codes, as those of torchao do."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float) -> _SelfScaled:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def test_tensors_that_dequantise_themselves_are_asked(tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    module = configured_module({Q0: _SelfScaled(codes, 0.25)})
    basis = rlspec.SpectralBasis.from_model(module, modules="q", cache_dir=tmp_path)
    assert torch.equal(basis.matrix(Q0).W, codes * 0.25)
    with pytest.raises(TensorError, match=f"{Q0}: codes of quantised weights"):
        rlspec.restore_(module, basis)


def test_plain_fp8_in_memory_is_restored_as_numbers(tmp_path: Path) -> None:
    base, tuned = torch.randn(64, 48).to(F8), torch.randn(64, 48).to(F8)
    basis = rlspec.SpectralBasis.from_tensors({Q0: base}, modules="q", rank=1.0, cache_dir=tmp_path)
    module = configured_module({Q0: tuned.clone()})
    rlspec.restore_(module, basis)
    u, _, vh = torch.linalg.svd(base.double(), full_matrices=False)
    truth = (u * torch.linalg.svdvals(tuned.double())) @ vh
    found = module.state_dict()[Q0]
    assert found.dtype == F8
    assert ((found.double() - truth).abs() <= 2**-4 * truth.abs() + 2**-9).all()  # half a step of three bits


UNKNOWN: dict[str, dict[str, Tensor]] = {
    "int8 of bitsandbytes": {"weight": torch.ones(64, 64, dtype=torch.int8), "SCB": torch.ones(64)},
    "nf4 of bitsandbytes, stored as bfloat16": {
        "weight": torch.ones(1024, 1, dtype=torch.bfloat16),
        "weight.absmax": torch.ones(64),
        "weight.quant_map": torch.ones(16),
        "weight.quant_state.bitsandbytes__nf4": torch.ones(8, dtype=torch.uint8),
    },
    "GPTQ": {
        "qweight": torch.ones(8, 64, dtype=torch.int32),
        "qzeros": torch.ones(1, 8),
        "scales": torch.ones(1, 64),
    },
    "packed integers of compressed-tensors": {
        "weight_packed": torch.ones(64, 8, dtype=torch.int32),
        "weight_scale": torch.ones(64, 1),
        "weight_shape": torch.ones(2, dtype=torch.int64),
    },
    "NVFP4": {
        "weight": torch.ones(64, 32, dtype=torch.uint8),
        "weight_scale": torch.ones(64, 4).to(F8),
        "weight_scale_2": torch.ones(()),
    },
    "fp8 with a zero point": {
        "weight": torch.ones(64, 64).to(F8),
        "weight_scale": torch.ones(64, 1),
        "weight_zero_point": torch.zeros(64, 1),
    },
    "fp8 with a scale of another name": {"weight": torch.ones(64, 64).to(F8), "scale": torch.ones(64, 1)},
    "int8 with a scale": {"weight": torch.ones(64, 64, dtype=torch.int8), "weight_scale": torch.ones(64, 1)},
    "16 bits with a scale": {"weight": torch.ones(64, 64).bfloat16(), "weight_scale": torch.ones(64, 1)},
}


@pytest.mark.parametrize("scheme", UNKNOWN)
def test_unknown_schemes_are_refused_by_every_reader(scheme: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    tracker = rlspec.SpectralTracker(
        rlspec.SpectralBasis.from_checkpoint(base, modules="q", cache_dir=tmp_path / "c")
    )
    stored = {Q0.replace("weight", leaf): tensor for leaf, tensor in UNKNOWN[scheme].items()}

    def store(tensors: dict[str, Tensor]) -> None:
        del tensors[Q0]
        tensors.update(stored)

    rewrite(tuned, store)
    owner = Q0.removesuffix(".weight")
    with pytest.raises(TensorError, match=rf"model.safetensors: {owner}|{owner}.weight: no such tensor"):
        tracker.measure(tuned, step=1)
    for read in (
        lambda: rlspec.SpectralBasis.from_checkpoint(tuned, modules="q", cache_dir=tmp_path / "c"),
        lambda: rlspec.SpectralBasis.from_tensors(stored, modules="q", cache_dir=tmp_path / "c"),
    ):
        with pytest.raises((TensorError, ProjectionError), match=rf"{owner}.*(quantised|not known)"):
            read()
    with pytest.raises(RlspecError, match=owner):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="q")
    assert not (tmp_path / "out").exists()


def test_packed_experts_do_not_stand_in_the_way_of_attention(tmp_path: Path) -> None:
    packed = {"model.layers.0.mlp.experts.0.up_proj.qweight": torch.ones(8, 64, dtype=torch.int32)}
    tensors = {Q0: torch.randn(64, 64), **packed}
    assert len(rlspec.SpectralBasis.from_tensors(tensors, modules="q", cache_dir=tmp_path)) == 1
    with pytest.raises(ProjectionError, match=r"up_proj\.qweight belongs to quantised weights"):
        rlspec.SpectralBasis.from_tensors(tensors, modules="q,mlp", cache_dir=tmp_path)


def test_an_adapter_on_a_quantised_base_is_refused_for_that(tmp_path: Path) -> None:
    """Not for the weights that it does not find there under their names."""
    base = tmp_path / "base"
    save_model(base, "llama")
    rewrite(base, lambda t: t.update({Q0.replace("weight", "qweight"): t.pop(Q0)}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    prefix = "base_model.model." + Q0.removesuffix(".weight")
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, 64), f"{prefix}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="qweight belongs to quantised weights"):
        rlspec.restore_checkpoint(base, adapter, tmp_path / "out")


def test_training_never_starts_from_codes(tmp_path: Path) -> None:
    """transformers reads scales only where config.json tells of them, and else leaves the codes."""
    save_model(tmp_path, "llama")
    codes = {}

    def quantise(tensors: dict[str, Tensor]) -> None:
        codes["plain"] = tensors[Q0].to(F8).float()
        tensors[Q0] = tensors[Q0].to(F8)

    rewrite(tmp_path, quantise)
    cpu = torch.device("cpu")
    loaded = dict(load_model(tmp_path, cpu).named_parameters())
    assert torch.equal(loaded[Q0].detach(), codes["plain"])  # without scales the codes are the numbers
    rewrite(tmp_path, lambda t: t.update({Q0 + "_scale_inv": torch.ones(1, 1)}))
    check_checkpoint(tmp_path, ("q",))
    with pytest.raises(
        CheckpointError, match="weight_scale_inv belongs to quantised weights, but config.json has no"
    ):
        load_model(tmp_path, cpu)
